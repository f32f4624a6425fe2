"""What each service class feels: the age of its oldest waiting request, and its recent time per output token.

The governor reads this before every step, so it must cost microseconds: one entry a request, no history.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from prism_runtime.engine.governor import ClassSignals
from prism_runtime.engine.types import Event, Finished, Request, Token

TPOT_SMOOTHING = 0.05
"""Weight of the newest step in the moving average, which remembers some twenty. A mean over a request's tokens is
promised, so one step that reads a long prompt says little.
"""


@dataclass(slots=True)
class _InFlight:
    class_name: str
    submitted_s: float
    last_token_s: float | None = None


class LoadSignals:
    """Follows requests to their last event. Thread-safe: the door submits, the engine's thread observes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, _InFlight] = {}
        self._running: dict[str, _InFlight] = {}
        self._tpot_s: dict[str, float] = {}

    def submitted(self, request: Request, class_name: str, now_s: float) -> None:
        with self._lock:
            self._waiting[request.request_id] = _InFlight(class_name, now_s)

    def withdrawn(self, request_id: str) -> None:
        """Forget a request that the engine refused."""
        with self._lock:
            self._waiting.pop(request_id, None)

    def observe(self, events: Iterable[Event], now_s: float) -> None:
        """Take in one step's events; all tokens of a step came at `now_s`."""
        with self._lock:
            gaps: dict[str, list[float]] = {}
            for event in events:
                if isinstance(event, Token):
                    self._observe_token(event, now_s, gaps)
                elif isinstance(event, Finished):
                    self._waiting.pop(event.request_id, None)
                    self._running.pop(event.request_id, None)
            for class_name, seen in gaps.items():
                mean_s = sum(seen) / len(seen)
                before_s = self._tpot_s.get(class_name, mean_s)
                self._tpot_s[class_name] = before_s + TPOT_SMOOTHING * (mean_s - before_s)

    def _observe_token(self, token: Token, now_s: float, gaps: dict[str, list[float]]) -> None:
        request = self._running.get(token.request_id)
        if request is None:
            request = self._waiting.pop(token.request_id, None)
            if request is None:
                return
            self._running[token.request_id] = request
        if request.last_token_s is not None:
            gaps.setdefault(request.class_name, []).append(now_s - request.last_token_s)
        request.last_token_s = now_s

    def read(self, now_s: float) -> dict[str, ClassSignals]:
        """Signals of every class with traffic; a class without running requests has no time per output token."""
        with self._lock:
            wait_s: dict[str, float] = {}
            for request in self._waiting.values():  # in order of arrival: the first of a class is its oldest
                wait_s.setdefault(request.class_name, now_s - request.submitted_s)
            running = {request.class_name for request in self._running.values()}
            self._tpot_s = {name: tpot_s for name, tpot_s in self._tpot_s.items() if name in running}
            return {
                name: ClassSignals(queue_wait_s=wait_s.get(name, 0.0), tpot_s=self._tpot_s.get(name))
                for name in wait_s.keys() | running
            }

    def in_flight(self) -> list[str]:
        """Ids of every request without a final event."""
        with self._lock:
            return [*self._waiting, *self._running]
