"""Keyed work queue: level-triggered, so a key says "look again", never what happened.

One visit of a key at a time; keys added meanwhile coalesce into one later visit. A failed visit is repeated after an
exponential back-off with jitter, per key; a visit may ask to be repeated later. Concurrency is bounded.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from prism_operator import metrics

CONCURRENCY = 8
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 300.0

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


class Backoff(Exception):
    """Raised by a visit that failed in an expected way: repeat it after at least `at_least_s`; no traceback."""

    def __init__(self, message: str, at_least_s: float = 0.0) -> None:
        super().__init__(message)
        self.at_least_s = at_least_s


class KeyedQueue(Generic[K]):
    """Calls `visit(key)` for every added key. `visit` returns seconds until it wants to look again, or None."""

    def __init__(
        self,
        visit: Callable[[K], Awaitable[float | None]],
        *,
        concurrency: int = CONCURRENCY,
        first_backoff_s: float = FIRST_BACKOFF_S,
        longest_backoff_s: float = LONGEST_BACKOFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._visit, self._concurrency, self._clock = visit, concurrency, clock
        self._first_backoff_s, self._longest_backoff_s = first_backoff_s, longest_backoff_s
        self._waiting: dict[K, float] = {}  # key -> since when; dicts keep order, so the oldest is served first
        self._visiting: dict[K, asyncio.Task[None]] = {}
        self._again: set[K] = set()  # added while being visited
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._paused = True
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, key: K) -> None:
        """Visit the key as soon as possible."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._visiting:
            self._again.add(key)
        else:
            self._waiting.setdefault(key, self._clock())
        self._start_visits()

    def add_later(self, key: K, delay_s: float) -> None:
        """Visit the key after a delay, unless it is added earlier."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(delay_s, self.add, key)

    def forget(self, key: K) -> None:
        """The object is gone: no further visit, no memory of failures."""
        self._waiting.pop(key, None)
        self._again.discard(key)
        self._failures.pop(key, None)
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def resume(self) -> None:
        """Start visiting; a new queue is paused, so that a standby collects keys and touches nothing."""
        self._paused = False
        self._start_visits()

    async def drain(self, timeout_s: float) -> None:
        """Start no more visits and let running ones end; those that take longer are cancelled."""
        self._paused = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        running = list(self._visiting.values())
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until nothing waits and nothing is visited; delayed keys do not count."""
        await self._idle.wait()

    @property
    def depth(self) -> int:
        return len(self._waiting)

    @property
    def age_s(self) -> float:
        """How long the oldest waiting key has waited."""
        oldest = min(self._waiting.values(), default=None)
        return 0.0 if oldest is None else self._clock() - oldest

    def _start_visits(self) -> None:
        while self._waiting and not self._paused and len(self._visiting) < self._concurrency:
            key = next(iter(self._waiting))
            del self._waiting[key]
            self._visiting[key] = asyncio.create_task(self._run(key), name=f"visit {key}")
        metrics.QUEUE_DEPTH.set(self.depth)
        metrics.QUEUE_AGE.set(self.age_s)
        if self._waiting or self._visiting:
            self._idle.clear()
        else:
            self._idle.set()

    async def _run(self, key: K) -> None:
        started_s = self._clock()
        result = "Done"
        try:
            look_again_s = await self._visit(key)
            self._failures.pop(key, None)
            if look_again_s is not None:
                self.add_later(key, look_again_s)
        except Backoff as failure:
            result = "Backoff"
            logger.warning("%s: %s", key, failure)
            self._repeat(key, failure.at_least_s)
        except Exception:
            result = "Error"
            logger.exception("reconcile of %s failed", key)
            self._repeat(key, 0.0)
        finally:
            metrics.RECONCILE_DURATION.labels(result).observe(self._clock() - started_s)
            del self._visiting[key]
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            else:
                self._start_visits()

    def _repeat(self, key: K, at_least_s: float) -> None:
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        backoff_s = min(self._longest_backoff_s, self._first_backoff_s * 2 ** min(failures, 30))
        self.add_later(key, max(at_least_s, backoff_s * random.uniform(0.5, 1.0)))
