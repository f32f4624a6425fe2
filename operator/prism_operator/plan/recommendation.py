"""What ticks of the slow loop ask for, and what lasts of it.

The need of one tick is noisy: 150 arrivals in half a minute vary by 8 %, and their lengths by as much. Where the budget
may move, it carries such noise, as it carries what comes until an order helps. So counts follow means over the down
window: of what is kept, and of a need that exceeds what is ordered by little. Only what exceeds it by more than the
tolerance, or what not even the floors would hold, is ordered at once.

Where the budget may not move, noise is paid for with objectives: every need counts by itself, and for the window.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.1
"""The Kubernetes HPA's default: a ratio this close to 1 moves nothing by itself."""
_ROUNDING = 1e-9
"""Keeps a need of exactly n replicas from asking for n + 1."""
_BEYOND_ANY_BOUND = 1e6


@dataclass(frozen=True, slots=True)
class Asked:
    """One tick's needs, in replicas. Real numbers count by their mean over the down window, whole ones by themselves.

    up       to scale up to, if it lasts
    at_once  the part of it that need not last
    nominal  what holds the mean load at the nominal points, with the headroom of the way up
    kept     the same with the headroom of the way down
    burst    what holds a burst at the floors, by costs that may be worse than the profile's
    least    what must be kept whatever the means say
    """

    up: int
    at_once: int
    nominal: float = 0.0
    kept: float = 0.0
    burst: float = 0.0
    least: int = 0

    @property
    def down(self) -> int:
        """What this tick alone would keep."""
        return max(whole(self.kept), whole(self.burst), self.least)

    @property
    def paused(self) -> bool:
        """There was no load."""
        return self.up == 0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What one slow tick asked for."""

    at_s: float
    asked: Asked


def flat(up: int, down: int) -> Asked:
    """A need of which no mean is taken: all of it counts at once, and is kept throughout the window."""
    return Asked(up, up, least=down)


def lasting(history: Sequence[Recommendation]) -> int:
    """What was needed at the nominal points on average."""
    return whole(statistics.fmean(one.asked.nominal for one in history))


def kept(history: Sequence[Recommendation]) -> int:
    """What the ticks of a window together keep.

    A window with pauses in it has no mean that tells anything: load that comes in bursts is kept for at its largest.
    """
    asked = [one.asked for one in history]
    if any(one.paused for one in asked):
        return max(one.down for one in asked)
    load, burst = statistics.fmean(one.kept for one in asked), statistics.fmean(one.burst for one in asked)
    return max(whole(load), whole(burst), *(one.least for one in asked))


def whole(replicas: float) -> int:
    """Pods for a real number of them. An objective out of reach needs infinitely many: more than any bound allows."""
    return math.ceil(min(replicas, _BEYOND_ANY_BOUND) - _ROUNDING)
