"""Accuracy scaling after Proteus: at a fixed number of replicas, the most accurate mix of points that holds the demand.

Source: Ahmad et al., "Proteus: A High-Throughput Inference-Serving System with Accuracy Scaling", ASPLOS 2024, and
UMass-LIDS/Proteus. Every 20 s: demand is an average with weight 0.7 on the newest window, times beta = 1.05; maximise
mean accuracy subject to capacity >= demand. When that cannot be met beta falls by 0.05 (0.1 above 1.5) down to 0.2.
With one model and equal replicas the paper's MILP comes down to which replica runs which point: the best mix has at
most two points, found here by enumeration. Requests go to the least loaded replica, so faster ones take more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_operator.simulate.control import Orders, Signals


@dataclass(frozen=True, slots=True)
class Choice:
    """An operating point, its relative quality, and the requests a second that one replica holds at it."""

    point: str
    quality: float
    capacity_per_s: float


class Proteus:
    period_s = 20.0
    wants_reports = wants_predictions = False
    name = "proteus"
    weight, beta, least_beta = 0.7, 1.05, 0.2

    def __init__(self, replicas: int, choices: Sequence[Choice]) -> None:
        self.replicas = replicas
        self.choices = sorted(choices, key=lambda choice: choice.quality)
        self._demand: float | None = None

    def decide(self, signals: Signals) -> Orders:
        rate = signals.offered / self.period_s
        self._demand = rate if self._demand is None else self.weight * rate + (1 - self.weight) * self._demand
        names = sorted(pod.name for pod in signals.pods)
        return Orders(replicas=self.replicas, pod_points=self._assign(names, self._demand) if names else {})

    def _assign(self, pods: Sequence[str], demand: float) -> Mapping[str, str]:
        beta = self.beta
        while True:
            mix = self._mix(len(pods), beta * demand)
            if mix is not None:
                lower, higher, lowered = mix
                return {name: (lower if n < lowered else higher).point for n, name in enumerate(pods)}
            beta -= 0.1 if beta > 1.5 else 0.05
            if beta < self.least_beta:
                return dict.fromkeys(pods, self.choices[0].point)

    def _mix(self, pods: int, demand: float) -> tuple[Choice, Choice, int] | None:
        """(lower, higher, replicas at lower) of the greatest accuracy of the answers that holds `demand`."""
        best: tuple[float, tuple[Choice, Choice, int]] | None = None
        for lower in self.choices:
            for higher in self.choices:
                for lowered in range(pods + 1):
                    slow, fast = (pods - lowered) * higher.capacity_per_s, lowered * lower.capacity_per_s
                    if slow + fast < demand or slow + fast <= 0:
                        continue
                    accuracy = (slow * higher.quality + fast * lower.quality) / (slow + fast)
                    if best is None or accuracy > best[0]:
                        best = accuracy, (lower, higher, lowered)
        return None if best is None else best[1]
