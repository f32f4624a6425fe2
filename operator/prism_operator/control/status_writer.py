"""Status writes off the tick's path: the last offer wins, one write per object and interval, only what changed.

A status that holds a new decision waits for a second at most: whoever reads it sees moves when they happen, and a
process that dies takes few of them along.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prism_operator.control.kube import Kube, KubeError, NotFound
from prism_operator.control.resources import Object, Resource

INTERVAL_S = 5.0
DECISION_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)

Key = tuple[Resource, str, str]


class StatusWriter:
    """`offer` replaces what is still to be written and returns at once; the statuses are quantised by `plan.status`."""

    def __init__(
        self,
        kube: Kube,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._kube, self._interval_s, self._clock, self._sleep = kube, interval_s, clock, sleep
        self._offered: dict[Key, Object] = {}
        self._written: dict[Key, Object] = {}
        self._written_s: dict[Key, float] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def offer(self, resource: Resource, namespace: str, name: str, status: Object) -> None:
        """Write this status soon, unless it equals the last one written."""
        key = (resource, namespace, name)
        if status == self._written.get(key):
            self._offered.pop(key, None)
            return
        self._offered[key] = status
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._write(key), name=f"status {namespace}/{name}")

    def remember(self, resource: Resource, namespace: str, name: str, status: Object) -> None:
        """What the object holds already, as read at a (re)start: an equal offer is not written."""
        self._written.setdefault((resource, namespace, name), status)

    def forget(self, resource: Resource, namespace: str, name: str) -> None:
        key = (resource, namespace, name)
        for memory in (self._offered, self._written, self._written_s):
            memory.pop(key, None)
        if task := self._tasks.pop(key, None):
            task.cancel()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _due_s(self, key: Key) -> float:
        """When the offered status may be written; a withdrawn offer is due at once, so that its task ends."""
        offered, written = self._offered.get(key), self._written.get(key, {})
        if offered is None:
            return self._clock()
        decided = offered.get("decisions") != written.get("decisions")
        interval_s = min(DECISION_INTERVAL_S, self._interval_s) if decided else self._interval_s
        return self._written_s.get(key, float("-inf")) + interval_s

    async def _write(self, key: Key) -> None:
        resource, namespace, name = key
        try:
            while key in self._offered:
                while (wait_s := self._due_s(key) - self._clock()) > 0:
                    await self._sleep(min(wait_s, DECISION_INTERVAL_S))  # an offer meanwhile may be due earlier
                status = self._offered.pop(key, None)
                if status is None:
                    return
                self._written_s[key] = self._clock()
                try:
                    before = self._written.get(key, {})
                    removed = dict.fromkeys(before.keys() - status.keys())
                    await self._kube.patch_status(resource, namespace, name, {**status, **removed})
                    self._written[key] = status
                except NotFound:
                    return
                except KubeError as error:
                    logger.warning("status of %s/%s not written, again in a few seconds: %s", namespace, name, error)
                    self._offered.setdefault(key, status)
        finally:
            self._tasks.pop(key, None)
