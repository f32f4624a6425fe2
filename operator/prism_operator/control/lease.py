"""Leader election by a Lease, with a deadline after which the leader stops acting by itself.

Three times, in seconds: others may take a Lease that they saw unchanged for `duration` (15); the leader must have
renewed within `renew_deadline` (10) or it may no longer act; it tries every `retry` (2). The gap between 10 and 15 is
what keeps two leaders from acting at once. Clocks of machines are never compared: a Lease is expired when this process
has observed it unchanged for its duration on its own monotonic clock.
"""

import asyncio
import enum
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prism_operator.control.kube import Conflict, Kube, KubeError, NotFound
from prism_operator.control.resources import LEASES, Object

LEADER_LEASE = "prism-operator"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    duration_s: int = 15
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.retry_s < self.renew_deadline_s < self.duration_s:
            raise ValueError(f"lease times must keep retry < renew deadline < duration; found {self}")


class Move(enum.Enum):
    """What the election loop does next."""

    ACQUIRE = "Acquire"
    RENEW = "Renew"
    WAIT = "Wait"


@dataclass(frozen=True, slots=True)
class Observed:
    """A Lease as this process last saw it change."""

    holder: str
    duration_s: float
    version: str
    since_s: float
    """Monotonic time at which this version was first seen."""


def observe(lease: Object, previous: Observed | None, now_s: float) -> Observed:
    """The Lease's state; a version seen before keeps the time of its first sight."""
    spec = lease.get("spec") or {}
    version = lease["metadata"]["resourceVersion"]
    unchanged = previous is not None and previous.version == version
    return Observed(
        holder=spec.get("holderIdentity") or "",
        duration_s=float(spec.get("leaseDurationSeconds") or 0),
        version=version,
        since_s=previous.since_s if previous is not None and unchanged else now_s,
    )


def next_move(observed: Observed, identity: str, now_s: float) -> Move:
    """Acquire a free or expired Lease, renew an own one, wait for everybody else's."""
    if observed.holder == identity:
        return Move.RENEW
    if not observed.holder or now_s - observed.since_s > observed.duration_s:
        return Move.ACQUIRE
    return Move.WAIT


class LeaseLost(Exception):
    """The renew deadline passed; this process must stop acting and exit."""


class Elector:
    """Acquires and renews one Lease. `may_act` is the only question that others ask."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        *,
        name: str = LEADER_LEASE,
        times: LeaseTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube, self._namespace, self._name, self._identity = kube, namespace, name, identity
        self._times, self._clock = times or LeaseTimes(), clock
        self._observed: Observed | None = None
        self._renewed_s: float | None = None
        self._lease: Object | None = None

    def may_act(self) -> bool:
        """True while the Lease is held and was renewed within the deadline."""
        return self._renewed_s is not None and self._clock() - self._renewed_s < self._times.renew_deadline_s

    async def acquire(self) -> None:
        """Wait until this process holds the Lease."""
        while True:
            if await self._attempt():
                return
            await asyncio.sleep(self._times.retry_s * random.uniform(0.8, 1.2))

    async def hold(self) -> None:
        """Renew until cancelled. Raises LeaseLost at the renew deadline, or at once when another holder is seen."""
        while True:
            await asyncio.sleep(self._times.retry_s * random.uniform(0.8, 1.0))
            renewed = await self._attempt()
            taken = not renewed and self._observed is not None and self._observed.holder not in ("", self._identity)
            if taken or not self.may_act():
                self._renewed_s = None
                holder = self._observed.holder if self._observed else "nobody"
                raise LeaseLost(f"Lease '{self._name}' was not renewed in time; last seen holder: '{holder}'")

    async def release(self) -> None:
        """Give the Lease back, so that a standby takes it within seconds; failures only make it wait for expiry."""
        held, self._renewed_s = self._renewed_s is not None, None
        if not held or self._lease is None:
            return
        self._lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
        try:
            await self._kube.replace_if(self._lease, timeout_s=2.0)
        except KubeError as error:
            logger.warning("lease not released, a standby has to wait for its expiry: %s", error)

    async def _attempt(self) -> bool:
        """One step of the election; True if the Lease is ours afterwards. Errors count as "not renewed"."""
        asked_s = self._clock()
        timeout_s = self._times.renew_deadline_s / 2
        try:
            try:
                lease = await self._kube.get(LEASES, self._namespace, self._name, timeout_s=timeout_s, attempts=1)
            except NotFound:
                self._lease = await self._kube.create_or_conflict(self._fresh_lease())
                self._renewed_s = asked_s
                return True
            self._observed = observe(lease, self._observed, self._clock())
            move = next_move(self._observed, self._identity, self._clock())
            if move is Move.WAIT:
                return False
            self._claim(lease, move)
            self._lease = await self._kube.replace_if(lease, timeout_s=timeout_s)
            self._observed = observe(self._lease, None, self._clock())
        except Conflict:
            return False
        except KubeError as error:
            logger.warning("lease: %s", error)
            return False
        self._renewed_s = asked_s  # counted from before the request: the answer may have been long under way
        return True

    def _claim(self, lease: Object, move: Move) -> None:
        spec: dict[str, Any] = lease.setdefault("spec", {})
        if move is Move.ACQUIRE:
            spec["acquireTime"] = _now()
            spec["leaseTransitions"] = (spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.duration_s,
            "renewTime": _now(),
        }

    def _fresh_lease(self) -> Object:
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.duration_s,
            "acquireTime": _now(),
            "renewTime": _now(),
            "leaseTransitions": 0,
        }
        metadata = {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata, "spec": spec}


def _now() -> str:
    """MicroTime of the Lease API; for readers only, never compared."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
