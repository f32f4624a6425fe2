"""An API server in memory for unit tests: optimistic concurrency, create conflicts, recorded writes. No schema, no SSA
merge: what apply, validation and admission do is tested on a real API server in tests/cluster."""

import copy
from typing import Any

from prism_operator.control.kube import Conflict, KubeError, NotFound
from prism_operator.control.resources import Object, Resource, resource_of

Place = tuple[str, str | None, str]


class FakeKube:
    def __init__(self) -> None:
        self.objects: dict[Place, Object] = {}
        self.writes: list[tuple[str, str, str]] = []
        self.statuses: list[tuple[str, Object]] = []
        self.events: list[Object] = []
        self.failing: KubeError | None = None
        self._version = 0

    def put(self, resource: Resource, obj: Object) -> Object:
        """Place an object as somebody else would."""
        self._version += 1
        stored = copy.deepcopy(obj)
        stored["metadata"].setdefault("uid", f"uid-{self._version}")
        stored["metadata"]["resourceVersion"] = str(self._version)
        self.objects[resource.plural, stored["metadata"].get("namespace"), stored["metadata"]["name"]] = stored
        return copy.deepcopy(stored)

    async def get(self, resource: Resource, namespace: str | None, name: str, **_: Any) -> Object:
        self._maybe_fail()
        try:
            return copy.deepcopy(self.objects[resource.plural, namespace, name])
        except KeyError:
            raise NotFound("get", name, 404, "NotFound", "", frozenset()) from None

    async def create_or_conflict(self, obj: Object) -> Object:
        self._maybe_fail()
        place = self._place(obj)
        if place in self.objects:
            raise Conflict("create", place[2], 409, "AlreadyExists", "", frozenset())
        self.writes.append(("create", obj["kind"], obj["metadata"]["name"]))
        return self.put(resource_of(obj), obj)

    async def replace_if(self, obj: Object, **_: Any) -> Object:
        self._maybe_fail()
        stored = self.objects[self._place(obj)]
        if stored["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            raise Conflict("update", obj["metadata"]["name"], 409, "Conflict", "", frozenset())
        self.writes.append(("update", obj["kind"], obj["metadata"]["name"]))
        return self.put(resource_of(obj), obj)

    async def apply(self, obj: Object, *, force: bool) -> Object:
        self._maybe_fail()
        self.writes.append(("apply", obj["kind"], obj["metadata"]["name"]))
        stored = self.objects.get(self._place(obj))
        if stored is not None:
            obj = copy.deepcopy(obj)
            obj["metadata"]["uid"] = stored["metadata"]["uid"]
        return self.put(resource_of(obj), obj)

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        self._maybe_fail()
        self.writes.append(("delete", resource.kind, name))
        self.objects.pop((resource.plural, namespace, name), None)

    async def patch(self, resource: Resource, namespace: str, name: str, change: Object) -> Object:
        """Labels and annotations alone."""
        obj, metadata = await self.get(resource, namespace, name), change["metadata"]
        if obj["metadata"]["uid"] != metadata["uid"]:
            raise Conflict("patch", name, 409, "Conflict", "another uid", frozenset())
        self.writes.append(("patch", resource.kind, name))
        for part in ("labels", "annotations"):
            merged = {**obj["metadata"].get(part, {}), **metadata[part]}
            obj["metadata"][part] = {key: value for key, value in merged.items() if value is not None}
        return self.put(resource, obj)

    async def patch_status(self, resource: Resource, namespace: str, name: str, status: Object) -> Object:
        self._maybe_fail()
        self.statuses.append((name, copy.deepcopy(status)))
        return {}

    async def create_event(self, event: Object) -> bool:
        self.events.append(event)
        return True

    def _maybe_fail(self) -> None:
        if self.failing is not None:
            raise self.failing

    @staticmethod
    def _place(obj: Object) -> Place:
        return resource_of(obj).plural, obj["metadata"].get("namespace"), obj["metadata"]["name"]
