"""Events on PrismServices: at most one per object and reason and cycle, dropped first when writes are throttled."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from prism_api import API_VERSION
from prism_operator.control.kube import Kube, KubeError
from prism_operator.control.resources import EVENTS

CYCLE_S = 60.0
LONGEST_NOTE = 1024

WARNINGS = frozenset(
    {
        "ScaleUpBlocked",
        "RehearsalFailed",
        "ReplicasReverted",
        "ConflictingOwner",
        "SignalsStale",
        "CapacityExhausted",
        "CostCapReached",
        "FleetQuotaReached",
        "QualityBudgetSpent",
        "DirectiveRejected",
        "EnvelopeExpired",
        "PodsUnschedulable",
        "ArtifactMismatch",
        "DirectiveWithheld",
        "NotAccepted",
    }
)
"""Reasons that are Events of type Warning; all others are Normal."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Regarding:
    """The PrismService that an Event is about."""

    namespace: str
    name: str
    uid: str


class Events:
    """`post` never waits and never raises; whoever decides must not depend on who reads."""

    def __init__(self, kube: Kube, identity: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube, self._identity, self._clock = kube, identity, clock
        self._posted_s: dict[tuple[str, str], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def post(self, regarding: Regarding, reason: str, action: str, note: str) -> None:
        """Post an Event unless the same reason was posted for the object within the cycle."""
        now_s, key = self._clock(), (regarding.uid, reason)
        if now_s - self._posted_s.get(key, float("-inf")) < CYCLE_S:
            return
        self._posted_s[key] = now_s
        self._posted_s = {k: at_s for k, at_s in self._posted_s.items() if now_s - at_s < CYCLE_S}
        task = asyncio.create_task(self._create(regarding, reason, action, note), name=f"event {reason}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait shortly for Events under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        for task in self._tasks:
            task.cancel()

    async def _create(self, regarding: Regarding, reason: str, action: str, note: str) -> None:
        event = {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": f"{regarding.name}.{uuid4().hex[:16]}", "namespace": regarding.namespace},
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": "moeprism.io/operator",
            "reportingInstance": self._identity[:128],
            "action": action,
            "reason": reason,
            "type": "Warning" if reason in WARNINGS else "Normal",
            "note": note[:LONGEST_NOTE],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": "PrismService",
                "namespace": regarding.namespace,
                "name": regarding.name,
                "uid": regarding.uid,
            },
        }
        try:
            await self._kube.create_event(event)
        except KubeError as error:
            logger.debug("event not posted: %s", error)
