"""Valid manifests, and edits of them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from prism_api import API_VERSION

Manifest = dict[str, Any]
ABSENT: Any = object()
"""Value of an edit that takes the field away."""

POINT = {"budgetPermille": 750, "policy": "prefix", "relativeQuality": "0.98", "relativeQualityLow": "0.97"}
CLASS = {"objectives": {"ttftMilliseconds": 800}}
DIGEST = "sha256:" + "0" * 64


def prism_service(name: str = "chat", **edits: Any) -> Manifest:
    """The smallest valid PrismService."""
    spec = {
        "modelRef": {"name": "small-moe"},
        "classes": [{"name": "standard", "objectives": {"ttftMilliseconds": 2000}}],
        "scaling": {"maxReplicas": 3},
        "pools": [{"name": "main", "accelerator": {"name": "cpu"}}],
        "runtime": {"image": "runtime:1"},
    }
    return edited({"apiVersion": API_VERSION, "kind": "PrismService", "metadata": {"name": name}, "spec": spec}, edits)


def prism_model(name: str = "small-moe", **edits: Any) -> Manifest:
    """The smallest valid PrismModel that has a knob."""
    full = {"budgetPermille": 1000, "policy": "full", "relativeQuality": "1", "relativeQualityLow": "1"}
    spec = {
        "source": {"image": {"reference": "model:1"}},
        "digest": DIGEST,
        "servedName": "small-moe",
        "operatingPoints": [{"name": "full", **full}, {"name": "b750", **POINT}],
    }
    return edited({"apiVersion": API_VERSION, "kind": "PrismModel", "metadata": {"name": name}, "spec": spec}, edits)


def edited(manifest: Manifest, edits: Mapping[str, Any]) -> Manifest:
    """A copy with values set at dotted paths; a number in a path is a position in a list, the next free one appends."""
    manifest = deepcopy(manifest)
    for path, value in edits.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node: Any = manifest
        for key in parents:
            node = node[key] if isinstance(key, int) else node.setdefault(key, {})
        if value is ABSENT:
            del node[last]
        elif isinstance(node, list) and last == len(node):
            node.append(deepcopy(value))
        else:
            node[last] = deepcopy(value)
    return manifest
