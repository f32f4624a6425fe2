"""A pod's life as its clients see it: starting, serving, leaving (still accepting), closed (finishing), gone.

Leaving has two parts because removal from a Service's endpoints takes seconds to reach every node: for the grace time
readiness is already false but requests are still taken. Then the doors close, what was accepted goes on up to the drain
time, and what is unfinished after that ends with an error event. No accepted request ends silently.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

from prism_runtime.server.dispatch import Dispatcher

log = logging.getLogger(__name__)


class Phase(StrEnum):
    STARTING = "Starting"
    SERVING = "Serving"
    LEAVING = "Leaving"
    CLOSED = "Closed"


class Lifecycle:
    """The phase and what follows from it. Phases only advance."""

    def __init__(self, *, ready_at_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ready_at_s = ready_at_s
        self._clock = clock
        self._leaving: Phase | None = None

    @property
    def phase(self) -> Phase:
        if self._leaving:
            return self._leaving
        return Phase.SERVING if self._clock() >= self._ready_at_s else Phase.STARTING

    def leave(self) -> None:
        self._leaving = self._leaving or Phase.LEAVING

    def close(self) -> None:
        self._leaving = Phase.CLOSED

    @property
    def ready(self) -> bool:
        return self.phase is Phase.SERVING

    @property
    def accepting(self) -> bool:
        return self.phase in (Phase.SERVING, Phase.LEAVING)

    @property
    def draining(self) -> bool:
        return self._leaving is not None


async def drain(
    lifecycle: Lifecycle,
    dispatcher: Dispatcher,
    *,
    grace_s: float,
    drain_s: float,
    close_doors: Callable[[], Awaitable[None]],
) -> int:
    """Leave in order. Returns the number of requests that did not finish in time (each got an error event)."""
    lifecycle.leave()
    log.info("draining", extra={"in_flight": dispatcher.in_flight, "grace_s": grace_s, "drain_s": drain_s})
    await asyncio.sleep(grace_s)
    lifecycle.close()
    await close_doors()
    try:
        async with asyncio.timeout(drain_s):
            await dispatcher.emptied()
    except TimeoutError:
        unfinished = dispatcher.fail_all(f"the server is shutting down; the answer did not finish within {drain_s:g} s")
        log.warning("drain time is over", extra={"unfinished": unfinished})
        return unfinished
    log.info("drained")
    return 0
