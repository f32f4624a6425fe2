"""Comparison of a rendered child with the object that lives under its name."""

from collections.abc import Mapping
from typing import Any

from prism_operator.control.resources import Object
from prism_operator.plan.children import INTENT_HASH


def controller_uid(obj: Object) -> str | None:
    """Uid of the object that controls this one."""
    owners = obj["metadata"].get("ownerReferences") or []
    return next((str(o["uid"]) for o in owners if o.get("controller")), None)


def owner_reference(service: Object) -> Object:
    """The ownerReference that makes garbage collection delete a child with its PrismService.

    `blockOwnerDeletion` stays false: it would need a right on finalizers, and nothing here must hold up a deletion.
    """
    return {
        "apiVersion": service["apiVersion"],
        "kind": service["kind"],
        "name": service["metadata"]["name"],
        "uid": service["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": False,
    }


def is_current(live: Object, intent: Object) -> bool:
    """True if applying the intent would change nothing: same intent hash, and nobody has changed what it says."""
    annotations = live["metadata"].get("annotations") or {}
    wanted = (intent["metadata"].get("annotations") or {}).get(INTENT_HASH)
    return annotations.get(INTENT_HASH) == wanted and contains(live, intent)


def contains(live: Any, intent: Any) -> bool:
    """True if the live value has everything that the intent says; it may have more keys, which are defaults.

    Lists must have the same length: an element that somebody added to a list of ours is a change.
    """
    if isinstance(intent, Mapping):
        return isinstance(live, Mapping) and all(
            contains(live.get(key), value) for key, value in intent.items() if value not in (None, {}, [])
        )
    if isinstance(intent, list):
        return isinstance(live, list) and len(live) == len(intent) and all(map(contains, live, intent))
    return bool(live == intent)
