"""Windows over time that replica laws share: maxima, minima and means of what was seen lately."""

from collections import deque
from collections.abc import Sequence


class Window:
    """Values with their times, none older than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, value: float) -> None:
        self._values.append((now_s, value))
        self.trim(now_s)

    def trim(self, now_s: float) -> None:
        while self._values and self._values[0][0] < now_s - self.seconds:
            self._values.popleft()

    @property
    def values(self) -> list[float]:
        return [value for _, value in self._values]

    def maximum(self, default: float) -> float:
        return max(self.values, default=default)

    def minimum(self, default: float) -> float:
        return min(self.values, default=default)

    def mean(self, default: float) -> float:
        values = self.values
        return sum(values) / len(values) if values else default


def quantile(values: Sequence[tuple[float, float]], share: float) -> float | None:
    """Quantile of weighted values (value, weight); None without any weight."""
    ordered = sorted(values)
    total = sum(weight for _, weight in ordered)
    if total <= 0:
        return None
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= share * total:
            return value
    return ordered[-1][0]
