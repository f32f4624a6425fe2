"""Horizontal Pod Autoscaler, autoscaling/v2.

Source: Kubernetes documentation, "Horizontal Pod Autoscaling": algorithm details and default behavior; pkg/controller/
podautoscaler (`replica_calculator.go`, `horizontal.go`). Every 15 s: ceil(current * metric/target) over the mean of
running + waiting requests per pod; nothing inside a tolerance of 0.1; pods that are not ready yet count as 0 when that
would scale up and are left out when it would scale down, and a correction that turns the direction stops the move.
"""

import math
from dataclasses import dataclass

from prism_operator.simulate.baselines.history import Window
from prism_operator.simulate.control import Orders, Signals


@dataclass(frozen=True, slots=True)
class Behavior:
    """`spec.behavior`: in each direction a stabilization window, and the most change of one period."""

    up_window_s: float = 0.0
    up_percent: float = 100.0
    up_pods: int = 4
    up_period_s: float = 15.0
    down_window_s: float = 300.0
    down_percent: float | None = 100.0
    down_pods: int | None = None
    down_period_s: float = 15.0


class RateLimit:
    """Stabilization, then the policies, as `behavior` has them: the more permissive policy counts."""

    def __init__(self, behavior: Behavior, least: int, most: int) -> None:
        self.behavior, self.least, self.most = behavior, least, most
        self._up, self._down = Window(behavior.up_window_s), Window(behavior.down_window_s)
        self._ups, self._downs = Window(behavior.up_period_s), Window(behavior.down_period_s)
        self._started = False

    def limit(self, now_s: float, current: int, wanted: int) -> int:
        """What may be ordered now; remembers the recommendation and the change.

        The first window begins with the current count, so that a fresh autoscaler does not shrink what it finds.
        """
        if not self._started:
            self._started = True
            self._up.add(now_s, current)
            self._down.add(now_s, current)
        self._up.add(now_s, wanted)
        self._down.add(now_s, wanted)
        lowest, highest = int(self._up.minimum(wanted)), int(self._down.maximum(wanted))
        stable = lowest if current < lowest else highest if current > highest else current
        stable = min(max(stable, self.least), self.most)
        b = self.behavior
        self._ups.trim(now_s)
        self._downs.trim(now_s)
        if stable > current:
            began = current - sum(self._ups.values)
            ceiling = max(began + b.up_pods, math.ceil(began * (1 + b.up_percent / 100)))
            allowed = max(current, min(stable, int(ceiling)))
            if allowed > current:
                self._ups.add(now_s, allowed - current)
            return allowed
        if stable < current:
            began = current + sum(self._downs.values)
            floors = []
            if b.down_percent is not None:
                floors.append(math.floor(began * (1 - b.down_percent / 100)))
            if b.down_pods is not None:
                floors.append(int(began) - b.down_pods)
            allowed = min(current, max(stable, min(floors, default=current)))
            if allowed < current:
                self._downs.add(now_s, current - allowed)
            return allowed
        return current


class Hpa:
    """`target`: requests, running and waiting, that one pod is to hold; with `waiting_only` only those that wait."""

    period_s = 15.0
    wants_reports = wants_predictions = False
    tolerance = 0.1
    initial_readiness_s = 30.0

    def __init__(
        self, target: float, least: int, most: int, *, waiting_only: bool = False, behavior: Behavior | None = None
    ) -> None:
        self.name = "hpa-waiting" if waiting_only else "hpa"
        self.target, self.waiting_only = target, waiting_only
        self._limit = RateLimit(behavior or Behavior(), least, most)

    def decide(self, signals: Signals) -> Orders:
        current = signals.provisioned
        wanted = self._wanted(signals, current)
        return Orders(replicas=self._limit.limit(signals.now_s, current, wanted))

    def _wanted(self, signals: Signals, current: int) -> int:
        if not signals.pods:
            return current
        values = [pod.waiting + (0 if self.waiting_only else pod.running) for pod in signals.pods]
        ratio = sum(values) / len(values) / self.target
        unready = current - len(signals.pods)
        if unready > 0 and ratio > 1:
            corrected = sum(values) / current / self.target
            # Not-ready pods at 0 turned the direction, or brought it inside the tolerance: do nothing.
            if corrected <= 1 + self.tolerance:
                return current
            return max(current, math.ceil(corrected * current))
        if abs(ratio - 1) <= self.tolerance:
            return current
        return math.ceil(ratio * (len(values) if ratio < 1 and unready > 0 else current))
