"""Knative's pod autoscaler on concurrency.

Source: knative/serving, pkg/autoscaler/scaling/autoscaler.go and the documentation of its defaults: tick 2 s, stable
window 60 s, panic window 6 s, target 70 % of the container's concurrency, at most 1000 times up and half down at once.
It panics while the panic window asks for at least twice what is ready, keeps the most it asked for meanwhile, and
leaves 60 s after the last such tick. Starts in panic when more than one pod is ready. Scale to zero is left out: the
other laws here have no such thing to compare with.
"""

import math

from prism_operator.simulate.baselines.history import Window
from prism_operator.simulate.control import Orders, Signals


class Knative:
    """`concurrency`: requests, running and waiting, that one pod can hold."""

    period_s = 2.0
    wants_reports = wants_predictions = False
    name = "knative"
    stable_s, panic_s = 60.0, 6.0
    utilisation, panic_threshold = 0.70, 2.0
    most_up, most_down = 1000.0, 2.0

    def __init__(self, concurrency: float, least: int, most: int) -> None:
        self.target = max(0.01, self.utilisation * concurrency)
        self.least, self.most = least, most
        self._stable, self._panic = Window(self.stable_s), Window(self.panic_s)
        self._panic_since_s: float | None = None
        self._panic_pods = 0
        self._started = False

    def decide(self, signals: Signals) -> Orders:
        now_s, ready = signals.now_s, max(1, len(signals.pods))
        in_flight = float(sum(pod.running + pod.waiting for pod in signals.pods))
        self._stable.add(now_s, in_flight)
        self._panic.add(now_s, in_flight)
        if not self._started:
            self._started = True
            if ready > 1:
                self._panic_since_s, self._panic_pods = now_s, ready
        up, down = math.ceil(self.most_up * ready), math.floor(ready / self.most_down)
        stable = min(max(math.ceil(self._stable.mean(0.0) / self.target), down), up)
        asked = math.ceil(self._panic.mean(0.0) / self.target)
        panicking = min(max(asked, down), up)
        if asked / ready >= self.panic_threshold:
            if self._panic_since_s is None:
                self._panic_pods = 0
            self._panic_since_s = now_s
        elif self._panic_since_s is not None and now_s - self._panic_since_s >= self.stable_s:
            self._panic_since_s = None
        wanted = stable
        if self._panic_since_s is not None:
            self._panic_pods = max(self._panic_pods, stable, panicking)
            wanted = self._panic_pods
        return Orders(replicas=min(max(wanted, self.least), self.most))
