"""The governor of a simulated pod: how it moves a class inside its envelope between two of the operator's directives.

The law is that of the runtime's governor (`engine/governor.py` there, which this side must not import; a property test
holds the two to the same moves), without fences and without expiry, for the channel of a simulation does not fall
silent. What it feels is what the runtime's signals are: the age of the oldest request without a first token, and the
time between the tokens of a class, smoothed by step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prism_operator.plan.types import ServicePolicy

PACE_SMOOTHING = 0.05
"""Weight of the newest step in the smoothed time between tokens, as in the runtime."""


@dataclass(slots=True)
class _Motion:
    point: int
    moved_s: float
    calm_since_s: float | None = None


class PodGovernor:
    """One pod's. Points are positions on the ladder inside, names outside. Times never fall."""

    def __init__(self, policy: ServicePolicy, points: Mapping[str, str], now_s: float) -> None:
        self._ladder = policy.ladder
        self._names = policy.ladder.names
        self._objectives = {one.name: (one.ttft_s, one.tpot_s) for one in policy.classes}
        self._high, self._low = policy.loop.governor_high, policy.loop.low
        self._down_s, self._up_s = policy.effective.dwell_down_ms / 1000, policy.effective.dwell_up_ms / 1000
        self._ordered = {name: self._ladder.index(points[name]) for name in self._objectives}
        self._floors = dict(self._ordered)
        self._motion = {name: _Motion(point, now_s) for name, point in self._ordered.items()}
        self._pace_s: dict[str, float] = {}

    @property
    def points(self) -> dict[str, str]:
        return {name: self._names[motion.point] for name, motion in self._motion.items()}

    def order(self, points: Mapping[str, str], floors: Mapping[str, str], now_s: float) -> None:
        """Take a directive: the ordered point is the ceiling; without a floor it is the floor as well.

        A class whose ordered point is repeated keeps the pod's own position, moved into the new range.
        """
        for name, motion in self._motion.items():
            point = self._ladder.index(points[name]) if name in points else self._ordered[name]
            floor = self._ladder.index(floors[name]) if name in floors else point
            kept = min(max(motion.point, floor), point) if point == self._ordered[name] else point
            if kept != motion.point or point != self._ordered[name]:
                self._motion[name] = _Motion(kept, now_s)
            self._ordered[name], self._floors[name] = point, floor

    def stepped(self, running: Iterable[str], step_s: float, steps: int) -> None:
        """That many steps of this length gave each class that runs a token each; a class that does not has no pace."""
        before, kept = self._pace_s, (1 - PACE_SMOOTHING) ** steps
        self._pace_s = {name: step_s + kept * (before.get(name, step_s) - step_s) for name in running}

    def follow(self, oldest_s: Mapping[str, float], now_s: float) -> bool:
        """Move by load; True if a class moved. `oldest_s`: arrival of the oldest request without a first token."""
        moved = [name for name in self._motion if self._follows(name, oldest_s, now_s)]
        return bool(moved)

    def _follows(self, name: str, oldest_s: Mapping[str, float], now_s: float) -> bool:
        motion = self._motion[name]
        saturation = self._saturation(name, oldest_s, now_s)
        if saturation > self._low:
            motion.calm_since_s = None
        elif motion.calm_since_s is None:
            motion.calm_since_s = now_s
        if saturation >= self._high:
            if motion.point > self._floors[name] and now_s - motion.moved_s >= self._down_s:
                self._motion[name] = _Motion(motion.point - 1, now_s)
                return True
            return False
        if motion.calm_since_s is None or motion.point >= self._ordered[name]:
            return False
        if now_s - max(motion.calm_since_s, motion.moved_s) < self._up_s:
            return False
        self._motion[name] = _Motion(motion.point + 1, now_s, calm_since_s=now_s)
        return True

    def idle_until(self, now_s: float) -> None:
        """Make up for the time without work: every class is calm, and rises as its dwell allows."""
        self._pace_s = {}
        for name, motion in list(self._motion.items()):
            since_s = motion.moved_s if motion.calm_since_s is None else motion.calm_since_s
            due_s = max(since_s, motion.moved_s) + self._up_s
            while motion.point < self._ordered[name] and due_s <= now_s:
                motion = self._motion[name] = _Motion(motion.point + 1, due_s, calm_since_s=due_s)
                due_s += self._up_s

    def next_s(self, oldest_s: Mapping[str, float], now_s: float) -> float:
        """When a class may have to move although neither arrivals nor pace change; infinite for never."""
        times = [math.inf]
        for name, motion in self._motion.items():
            ttft_s = self._objectives[name][0]
            saturation = self._saturation(name, oldest_s, now_s)
            if motion.point > self._floors[name]:
                if saturation >= self._high:
                    times.append(motion.moved_s + self._down_s)
                elif name in oldest_s and ttft_s is not None:
                    times.append(max(oldest_s[name] + self._high * ttft_s, motion.moved_s + self._down_s))
            if motion.point < self._ordered[name] and motion.calm_since_s is not None:
                times.append(max(motion.calm_since_s, motion.moved_s) + self._up_s)
        return min(times)

    def _saturation(self, name: str, oldest_s: Mapping[str, float], now_s: float) -> float:
        ttft_s, tpot_s = self._objectives[name]
        wait = (now_s - oldest_s[name]) / ttft_s if ttft_s is not None and name in oldest_s else 0.0
        pace = self._pace_s[name] / tpot_s if tpot_s is not None and name in self._pace_s else 0.0
        return max(wait, pace)
