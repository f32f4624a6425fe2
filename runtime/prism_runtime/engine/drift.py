"""The drift guard: holds the realised activation budget of threshold points at the nominal one.

A threshold is calibrated on one text; on another the same threshold runs more or fewer sub-experts (5 % and more). The
guard is a PI controller for each point: it watches the realised mean over the last tokens and shifts the logarithm of
the point's threshold in all layers. A pure state machine without clock or randomness: equal counts give equal shifts.

    y      exponentially weighted mean of the realised budget, `window_tokens` long
    e      (y - nominal) / nominal
    shift  gain * (e + sum of e * tokens / window_tokens), within +-limit

With equal gains the integral part cancels the lag of the mean, so the loop behaves like one integrator. The budget
falls by 0.4 to 1.5 % per 1 % of threshold, depending on how wide the scores spread and on the budget, so an error
decays within a quarter of a window to one and does not overshoot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_WEIGHT = 0.2
"""Share of a window that one correction may stand for: stable while a budget moves less than 3 % per 1 % of threshold.
"""


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """Settings of the controller.

    window_tokens  length of the mean, in tokens of one point
    period_tokens  tokens of a point between two corrections
    gain           shift of the logarithm of the threshold for a relative error of 1
    limit          largest shift to either side: a domain that needs more is not what the point was measured on
    """

    window_tokens: int = 1024
    period_tokens: int = 128
    gain: float = 3.0
    limit: float = 0.5


@dataclass(frozen=True, slots=True)
class HeldBudget:
    """What the guard knows of one point, a ladder index.

    nominal   activation budget that it holds, 0 to 1
    realised  mean of the last `window_tokens`, the cost of gates and compensation in it; None before the first period
    shift     of the logarithm of the threshold; above 0 for traffic that spends more than what was calibrated on
    at_limit  it can shift no further: the point no longer keeps its nominal budget on this traffic
    """

    point: int
    nominal: float
    realised: float | None
    shift: float
    at_limit: bool


@dataclass(slots=True)
class _Point:
    """What one point's controller remembers; `tokens`, `spent` and `routed` are totals at the last correction."""

    nominal: float
    tokens: int = 0
    spent: float = 0.0
    routed: float = 0.0
    error: float = 0.0
    integral: float = 0.0
    shift: float = 0.0
    realised: float | None = None


class DriftGuard:
    """One controller for each point in `nominal`: ladder index -> nominal activation budget, 0 to 1."""

    def __init__(self, nominal: dict[int, float], settings: DriftSettings | None = None) -> None:
        self._settings = settings or DriftSettings()
        self._points = {point: _Point(budget) for point, budget in nominal.items()}

    @property
    def points(self) -> Sequence[int]:
        return list(self._points)

    def due(self, point: int, tokens: int) -> bool:
        """True if `tokens`, the point's total so far, is a period past the last correction."""
        return tokens - self._points[point].tokens >= self._settings.period_tokens

    def correct(self, point: int, tokens: int, spent: float, routed: float) -> float:
        """The new shift of a point's log threshold, from its totals since the start.

        tokens, spent, routed  tokens; sub-experts run with the cost of gates and compensation; sub-experts routed
        """
        settings, state = self._settings, self._points[point]
        if routed <= state.routed:  # forwards that raised attached rows and ran none
            return state.shift
        arrived, budget = tokens - state.tokens, (spent - state.spent) / (routed - state.routed)
        state.tokens, state.spent, state.routed = tokens, spent, routed
        state.realised = spent / routed
        # A long prompt is one forward and one correction: it may not count for more, or the loop would overshoot.
        weight = min(arrived / settings.window_tokens, LARGEST_WEIGHT)
        error = budget / state.nominal - 1
        state.error += (error - state.error) * -math.expm1(-weight)
        integral = state.integral + state.error * weight
        bound = settings.limit / settings.gain
        state.integral = min(max(integral, -bound), bound)
        state.shift = min(max(settings.gain * (state.error + state.integral), -settings.limit), settings.limit)
        return state.shift

    def shift(self, point: int) -> float:
        return self._points[point].shift

    def realised(self, point: int) -> float | None:
        """Mean realised budget of a point up to its last correction; None before the first."""
        return self._points[point].realised

    def held(self) -> list[HeldBudget]:
        """Every point's budget up to its last correction; from any thread."""
        return [
            HeldBudget(
                point,
                state.nominal,
                None if state.realised is None else state.nominal * (1 + state.error),
                state.shift,
                self.at_limit(point),
            )
            for point, state in self._points.items()
        ]

    def at_limit(self, point: int) -> bool:
        """True if the guard can shift no further: the point no longer keeps its nominal budget on this traffic."""
        return abs(self._points[point].shift) >= self._settings.limit
