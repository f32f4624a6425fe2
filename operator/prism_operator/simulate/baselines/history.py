"""Windows over time that replica laws share: maxima, minima and means of what was seen lately."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence


class Window:
    """Values with their times, all younger than `seconds`.

    Open on the left, as the HPA's stabilization ("after the cutoff") and Prometheus' range selectors (from 3.0) are.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, value: float) -> None:
        self._values.append((now_s, value))
        self.trim(now_s)

    def trim(self, now_s: float) -> None:
        while self._values and self._values[0][0] <= now_s - self.seconds:
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


def histogram_quantile(share: float, bounds: Sequence[float], values: Sequence[tuple[float, float]]) -> float | None:
    """Prometheus' `histogram_quantile` of weighted values (value, weight) counted in buckets with these upper bounds.

    Linear inside a bucket; the highest finite bound for what lies beyond it; None without any weight.
    """
    counts = [0.0] * (len(bounds) + 1)
    for value, weight in values:
        counts[bisect_left(bounds, value)] += weight
    rank = share * sum(counts)
    if rank <= 0:
        return None
    below = 0.0
    for index, bound in enumerate(bounds):
        if below + counts[index] >= rank:
            lower = bounds[index - 1] if index else 0.0
            return lower + (bound - lower) * (rank - below) / counts[index]
        below += counts[index]
    return bounds[-1]
