"""Informer: a live copy of one kind of object, trimmed to what is used.

List in pages, watch from the list's version with bookmarks, list again when the version is too old, reconnect when the
watch is silent. A list replaces the copy at once, so deletions missed while away are found. Nothing may be decided
before `synced` is set: an empty copy is ignorance, not an empty cluster.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from prism_operator.control.kube import Forbidden, Gone, Kube, KubeError
from prism_operator.control.resources import Object, Resource
from prism_operator.plan.pod_template import SERVICE_LABEL, SERVING_LABEL

REHEARSED_ANNOTATION = "moeprism.io/rehearsed"
"""On a pod that the operator took out of traffic. One that lacks the serving label without it was taken out by hand."""
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0

logger = logging.getLogger(__name__)


class Trimmed(Protocol):
    """What every copy carries, whatever else it keeps."""

    @property
    def namespace(self) -> str: ...

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Trimmed)


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod of a service; times are seconds since the Unix epoch as the API server and kubelet wrote them."""

    namespace: str
    name: str
    uid: str
    service: str
    ip: str | None
    node: str | None
    phase: str
    ready: bool
    deleting: bool
    unschedulable: bool
    created_unix_s: float
    ready_unix_s: float | None
    serving: bool = True
    """Carries the label that the Service selects."""
    rehearsed: bool = False
    """The operator took it out of traffic."""


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """The replica count a service's Deployment orders, and who else claims that field."""

    namespace: str
    name: str
    uid: str
    service: str
    owner_uid: str | None
    intent_hash: str | None
    replicas: int
    existing_replicas: int
    rolling_out: bool
    """Pods of an older template exist."""
    foreign_replica_owner: str | None


def unix_seconds(timestamp: str) -> float:
    """Seconds since the Unix epoch of an RFC 3339 time."""
    return datetime.fromisoformat(timestamp).timestamp()


def pod_record(obj: Object) -> PodRecord:
    metadata, status = obj["metadata"], obj.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    ready, scheduled = conditions.get("Ready", {}), conditions.get("PodScheduled", {})
    is_ready = ready.get("status") == "True"
    return PodRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        service=metadata["labels"][SERVICE_LABEL],
        ip=status.get("podIP"),
        node=obj.get("spec", {}).get("nodeName"),
        phase=status.get("phase", "Pending"),
        ready=is_ready,
        deleting="deletionTimestamp" in metadata,
        unschedulable=scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable",
        created_unix_s=unix_seconds(metadata["creationTimestamp"]),
        ready_unix_s=unix_seconds(ready["lastTransitionTime"]) if is_ready else None,
        serving=metadata["labels"].get(SERVING_LABEL) == "true",
        rehearsed=REHEARSED_ANNOTATION in (metadata.get("annotations") or {}),
    )


def deployment_record(obj: Object) -> DeploymentRecord:
    metadata = obj["metadata"]
    status, replicas = obj.get("status") or {}, obj.get("spec", {}).get("replicas", 1)
    owners = [o for o in metadata.get("ownerReferences") or [] if o.get("controller")]
    existing = status.get("replicas", 0)
    unseen = status.get("observedGeneration", 0) < metadata.get("generation", 0)
    return DeploymentRecord(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        service=metadata["labels"][SERVICE_LABEL],
        owner_uid=owners[0]["uid"] if owners else None,
        intent_hash=(metadata.get("annotations") or {}).get("moeprism.io/intent-hash"),
        replicas=replicas,
        existing_replicas=existing,
        rolling_out=not unseen and status.get("updatedReplicas", 0) < existing,
        foreign_replica_owner=foreign_owner_of_replicas(metadata.get("managedFields") or []),
    )


def foreign_owner_of_replicas(managed_fields: list[dict[str, Any]]) -> str | None:
    """The newest manager other than ours that wrote `spec.replicas`."""
    writers = [
        (str(entry.get("time", "")), str(entry.get("manager", "unknown")))
        for entry in managed_fields
        if "f:replicas" in (entry.get("fieldsV1") or {}).get("f:spec", {})
        and entry.get("manager") != "prism-operator"
        and entry.get("subresource") != "status"
    ]
    return max(writers)[1] if writers else None


class Informer(Generic[T]):
    """A live copy of one kind in one namespace (None: all of them).

    `on_change(old, new)` is called in the event loop for every difference, with None for "not there".
    """

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        namespace: str | None,
        transform: Callable[[Object], T],
        on_change: Callable[[T | None, T | None], None],
        *,
        label_selector: str = SERVICE_LABEL,
    ) -> None:
        self._kube, self._resource, self._namespace = kube, resource, namespace
        self._transform, self._on_change, self._selector = transform, on_change, label_selector
        self._items: dict[tuple[str, str], T] = {}
        self.synced = asyncio.Event()
        self.last_contact_s: float | None = None
        """Event loop time of the last list or event; the age of this copy."""
        self.refusal: Forbidden | None = None
        """The API server's refusal at the last try; None once it let us in."""

    async def run(self) -> None:
        """List and watch until cancelled; failures back off with jitter and never end the loop."""
        backoff_s, version = FIRST_BACKOFF_S, ""
        while True:
            try:
                if not version:
                    version = await self._list()
                async for kind, obj in self._kube.watch(self._resource, self._namespace, version, self._selector):
                    version = obj["metadata"]["resourceVersion"]
                    self._observe(kind, obj)
                    backoff_s = FIRST_BACKOFF_S
            except Gone:
                version = ""
            except KubeError as error:
                self.refusal = error if isinstance(error, Forbidden) else None
                logger.warning("watch of %s broke, again in about %.1f s: %s", self._resource.plural, backoff_s, error)
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
                backoff_s = min(LONGEST_BACKOFF_S, 2 * backoff_s)
                if error.status:  # the server spoke and refused: what it knows may differ from what we remember
                    version = ""

    def forget(self) -> None:
        """Report every object as not there; for a copy whose `run` was cancelled."""
        old, self._items = self._items, {}
        for record in old.values():
            self._on_change(record, None)

    async def _list(self) -> str:
        fresh: dict[tuple[str, str], T] = {}
        version = ""
        async for items, list_version in self._kube.list_pages(self._resource, self._namespace, self._selector):
            version = list_version
            for obj in items:
                record = self._transform(obj)
                fresh[record.namespace, record.name] = record
        old, self._items = self._items, fresh
        self.last_contact_s = asyncio.get_running_loop().time()
        for key in old.keys() - fresh.keys():
            self._on_change(old[key], None)
        for key, record in fresh.items():
            if old.get(key) != record:
                self._on_change(old.get(key), record)
        self.refusal = None
        self.synced.set()
        return version

    def _observe(self, kind: str, obj: Object) -> None:
        self.last_contact_s = asyncio.get_running_loop().time()
        if kind == "BOOKMARK":
            return
        record = self._transform(obj)
        key = (record.namespace, record.name)
        old = self._items.get(key)
        if kind == "DELETED":
            self._items.pop(key, None)
            self._on_change(old, None)
        elif old != record:
            self._items[key] = record
            self._on_change(old, record)
