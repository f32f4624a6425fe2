"""The engine's thread: steer, step, pace, tell. One pass is one step.

Before each step the governor is asked for a swap; after it the pacer lets the prescribed time pass; then the events go
to a listener. An error of the engine never ends the thread: everything in flight fails with one final event each, and
the loop goes on. Liveness turns false only if steps cannot run: the thread is gone, one step hangs, or several in a row
raised.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_api.control import Directive, EnvelopeState, Held
from prism_api.points import Ladder
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.drift import HeldBudget
from prism_runtime.engine.governor import ClassTable, Governor, Refused, Swap, SwapCause
from prism_runtime.engine.pace import Pacer
from prism_runtime.engine.signals import LoadSignals
from prism_runtime.engine.types import EngineLoad, Event, Finished, FinishReason, Plan, Request, StepReport

log = logging.getLogger(__name__)

IDLE_TICK_S = 0.05
"""How often an idle pod lets the governor tick: bounds the delay of a swap or of the envelope's expiry without work."""

FAILED_STEPS_UNTIL_DEAD = 3
"""One bad step is an accident of its batch; three in a row, each with another batch, are a broken engine."""


class SteppingEngine(Protocol):
    """The part of `engine.Engine` that the loop drives."""

    @property
    def ladder(self) -> Ladder: ...
    @property
    def costs(self) -> StepCosts: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def set_plan(self, plan: Plan) -> None: ...
    def step(self) -> StepReport: ...
    def load(self) -> EngineLoad: ...
    def budgets(self) -> Sequence[HeldBudget]: ...


@dataclass(frozen=True, slots=True)
class SwapDone:
    """A plan that has become live, and the seconds from its cause to the start of its first step."""

    plan: Plan
    cause: SwapCause
    seconds: float


class Listener(Protocol):
    """Called on the engine's thread; must return at once and never raise."""

    def swapped(self, swap: SwapDone) -> None: ...
    def stepped(self, events: tuple[Event, ...]) -> None: ...


@dataclass(slots=True)
class StepTotals:
    """Work since start; an idle pass counts as none. `busy_s` includes the pace."""

    count: int = 0
    busy_s: float = 0.0
    failed: int = 0


class EngineLoop:
    """Owns the engine's thread. `submit`, `cancel`, `apply` and the properties may be called from any thread."""

    def __init__(
        self,
        engine: SteppingEngine,
        governor: Governor,
        *,
        pacer: Pacer | None = None,
        watchdog_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.engine = engine
        self.governor = governor
        self.signals = LoadSignals()
        self.pacer = pacer
        self.totals = StepTotals()
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._sleep = sleep
        self._steering = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._failures_in_a_row = 0
        self._beat_s = clock()
        self._thread = threading.Thread(target=self._run, name="prism-engine", daemon=True)
        self._listener: Listener
        engine.set_plan(governor.plan)

    # -- from any thread ----------------------------------------------------------------------------------------

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._beat_s = self._clock()
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step it is in. Raises TimeoutError if that step does not end."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's step did not end within {timeout_s:g} s")

    def submit(self, request: Request, class_name: str) -> None:
        """Queue a request. Raises Rejected or Overloaded, and then nothing was queued."""
        self.signals.submitted(request, class_name, self._clock())
        try:
            self.engine.submit(request)
        except Exception:
            self.signals.withdrawn(request.request_id)
            raise
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self._wake.set()

    def apply(self, directive: Directive) -> Held | Refused:
        with self._steering:
            answer = self.governor.apply(directive, self._clock())
        self._wake.set()
        return answer

    def held(self) -> Held:
        with self._steering:
            return self.governor.held(self._clock())

    @property
    def classes(self) -> ClassTable:
        return self.governor.classes

    @property
    def settled(self) -> bool:
        """True once every move decided so far, by directive or governor, is live in the engine."""
        with self._steering:
            return self.governor.settled and self.engine.plan.version == self.governor.plan.version

    @property
    def alive(self) -> bool:
        """Liveness: steps run or could run. Never a matter of load."""
        return (
            self._thread.is_alive()
            and self._clock() - self._beat_s < self._watchdog_s
            and self._failures_in_a_row < FAILED_STEPS_UNTIL_DEAD
        )

    # -- on the engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._beat_s = self._clock()
            swap = self._steer()
            if not self.engine.has_work and self.engine.plan.version == self.governor.plan.version:
                self._wake.wait(IDLE_TICK_S)
                self._wake.clear()
                continue
            try:
                self._step(swap)
                self._failures_in_a_row = 0
            except Exception as error:
                self._fail_in_flight(error)

    def _steer(self) -> Swap | None:
        now_s = self._clock()
        with self._steering:
            was = self.governor.state
            swap = self.governor.tick(self.signals.read(now_s), now_s)
            if self.governor.state is EnvelopeState.EXPIRED and was is not EnvelopeState.EXPIRED:
                log.warning("envelope expired; going to the safe point")
            if swap:
                self.engine.set_plan(swap.plan)
        return swap

    def _step(self, swap: Swap | None) -> None:
        begun_s = self._clock()
        report = self.engine.step()
        if swap:
            self._listener.swapped(SwapDone(swap.plan, swap.cause, max(0.0, begun_s - swap.due_s)))
        if not report.idle:
            if self.pacer:
                prescribed_s = self.pacer.step_s(report)
                rest_s = self.pacer.rest_s(prescribed_s, self._clock() - begun_s)
                if rest_s > 0:
                    self._sleep(rest_s)
            took_s = self._clock() - begun_s
            self.engine.costs.observe(report.decode_at, report.context_tokens, report.prefill_at, took_s)
            self.totals.count += 1
            self.totals.busy_s += took_s
        self.signals.observe(report.events, self._clock())
        if report.events:
            self._listener.stepped(report.events)

    def _fail_in_flight(self, error: Exception) -> None:
        """The engine may have lost events of this step, so nobody in flight may wait for a later one."""
        self._failures_in_a_row += 1
        self.totals.failed += 1
        request_ids = self.signals.in_flight()
        log.error("engine step failed", extra={"error": type(error).__name__, "failed_requests": len(request_ids)})
        events = tuple(
            Finished(request_id, FinishReason.FAILED, f"the engine failed in a step ({type(error).__name__})")
            for request_id in request_ids
        )
        for request_id in request_ids:
            self.engine.cancel(request_id)
        self.signals.observe(events, self._clock())
        self._listener.stepped(events)
        self._sleep(IDLE_TICK_S)
