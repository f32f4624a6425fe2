"""What happens to a pool besides its load: start times, failures, and a channel that delays and loses reports."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

StartTime = Callable[[int], float | None]
"""Seconds from the creation of the n-th pod to its readiness; None for one that never becomes ready."""


@dataclass(frozen=True, slots=True)
class World:
    """What happens to a pool besides its load. Probabilities are per tick or per pod; the default world is kind.

    report_lag_s      age of what a controller sees
    directive_lag_s   until pods take a controller's points
    report_loss       chance that a pod's report of one tick is lost
    never_ready       chance that a pod which is started never becomes ready
    crashes_per_hour  rate at which a ready pod crashes; its requests are lost, the Deployment replaces it
    slow_pods         chance that a pod is on a bad node, where every step takes `slow_factor` times as long
    drain_s           how long a pod that is told to stop may finish its requests
    random_routing    each request goes to a ready pod by chance, as kube-proxy has it, and not to the least busy one
    by_deadline       pods start waiting requests as this project's runtime does, and not in order of arrival
    governors         pods move by themselves inside the envelope of a policy that gives one
    """

    seed: int = 0
    step_noise: float = 0.05
    report_lag_s: float = 0.0
    directive_lag_s: float = 0.005
    report_loss: float = 0.0
    never_ready: float = 0.0
    crashes_per_hour: float = 0.0
    slow_pods: float = 0.0
    slow_factor: float = 1.5
    drain_s: float = 600.0
    random_routing: bool = False
    by_deadline: bool = False
    governors: bool = False

    def stream(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")


def lognormal_start(seed: int, median_s: float, p90_s: float) -> StartTime:
    """Start times with the given median and 90 % quantile; the n-th pod's is the same whoever starts it."""
    deviation = math.log(p90_s / median_s) / 1.2815515594
    return lambda n: random.Random(f"{seed}/start/{n}").lognormvariate(math.log(median_s), deviation)
