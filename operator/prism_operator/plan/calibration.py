"""Correction of a profile that does not agree with what pods do: one factor on all of its costs.

Observed mean time per output token over the predicted one, wherever the prediction is good: one point per class in the
window, enough requests, utilisation at most 0.7 (by the profile; beyond it the closed form is off, and a profile that
is too optimistic believes itself below), a load whose peaks fitted too (the prediction is of the mean load, and a burst
that filled the pool is another one), outputs long enough that one prompt which is read beside a request hardly shows in
its mean: else the figure tells of coincidences. The factor moves slowly and says nothing about single points.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from prism_api.control import HISTOGRAM_BOUNDS_MS
from prism_api.profile import Profile
from prism_operator.plan import capacity
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.types import ClassDelta, DemandState, LoopSettings, Observation

LEAST, MOST = 0.5, 2.0
UNDECIDED = HISTOGRAM_BOUNDS_MS[1] / HISTOGRAM_BOUNDS_MS[0]
"""Width of a latency bucket: a ratio closer to 1 than this cannot be told from rounding and counts as 1."""
STEADY_SHARE = 0.9
"""Share of a window's tokens that one point must have made for the prediction to be about that point."""
TRUSTED_UTILISATION = 0.7

DISTURBED = 0.25
"""Share of a token's predicted time that one other prompt, spread over the request that it delays, may add."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One class's traffic in the long window; `peak_per_s`: the largest rate that pressed in it."""

    load: ClassLoad
    peak_per_s: float
    seen: ClassDelta


def corrected(
    factor: float,
    variance: float,
    evidence: list[Evidence],
    observation: Observation,
    loop: LoopSettings,
    elapsed_s: float,
) -> tuple[float, float]:
    """The factor and its variance after `elapsed_s` more of this evidence; both stay while nothing can be judged.

    The variance is that of what is observed around the factor: it is large while the factor is on its way to a new
    value, and where a single factor does not describe what pods do.
    """
    ratio = _ratio(evidence, observation, loop)
    if ratio is None:
        return factor, variance
    target = 1.0 if 1 / UNDECIDED < ratio < UNDECIDED else min(MOST, max(LEAST, ratio))
    weight = 1 - math.exp(-elapsed_s / loop.calibration_s)
    off = target - factor
    return factor + weight * off, variance + weight * (off * off * (1 - weight) - variance)


def cautious(state: DemandState, loop: LoopSettings) -> float:
    """The factor plus its standard error: what a scale-down must not rely on being better than.

    The factor is a moving average, of windows that are independent if they do not overlap.
    """
    weight = 1 - math.exp(-loop.long_window_s / loop.calibration_s)
    return state.cost_factor + math.sqrt(state.cost_variance * weight / (2 - weight))


def _ratio(evidence: list[Evidence], observation: Observation, loop: LoopSettings) -> float | None:
    profile, ready = observation.profile, len(observation.ready)
    requests = sum(sum(one.seen.tpot) for one in evidence)
    if profile is None or not ready or len(observation.fresh) < ready or requests < loop.enough_arrivals:
        return None
    points = {}
    for one in evidence:
        point = _steady_point(one.seen)
        if point is None:
            return None
        points[one.load.policy.name] = point
    loads = [one.load for one in evidence]
    idle_s = capacity.time_per_token_s([replace(load, per_s=1e-9) for load in loads], points, profile, ready)
    predicted_s = capacity.time_per_token_s(loads, points, profile, ready)
    if not idle_s or not predicted_s or 1 - idle_s / predicted_s > TRUSTED_UTILISATION:
        return None
    peaks = capacity.replicas_for([replace(one.load, per_s=one.peak_per_s) for one in evidence], points, profile)
    if peaks is None or peaks > ready:
        return None
    if any(_disturbed(one.load, points[one.load.policy.name], profile, predicted_s) for one in evidence):
        return None
    return sum(_sum_s(one.seen.tpot) for one in evidence) / requests / predicted_s


def _disturbed(load: ClassLoad, point: str, profile: Profile, predicted_s: float) -> bool:
    costs, inverse = profile.points[point], load.lengths.output_inverse
    prompt_ns = costs.prefill_base_nanoseconds + costs.prefill_per_token_nanoseconds * load.lengths.prompt_tokens
    return inverse is not None and prompt_ns * 1e-9 * inverse > DISTURBED * predicted_s


def _steady_point(seen: ClassDelta) -> str | None:
    total = sum(seen.tokens_by_point.values())
    point = max(seen.tokens_by_point, key=lambda name: seen.tokens_by_point[name], default=None)
    return point if point is not None and seen.tokens_by_point[point] >= STEADY_SHARE * total > 0 else None


def _sum_s(histogram: tuple[int, ...]) -> float:
    """Sum of the latencies of a histogram, each taken at the geometric middle of its bucket."""
    if not histogram:
        return 0.0
    finite = [*HISTOGRAM_BOUNDS_MS[:-1], HISTOGRAM_BOUNDS_MS[-2]]
    bounds = [HISTOGRAM_BOUNDS_MS[0] / UNDECIDED, *finite]
    return sum(
        count * math.sqrt(low * high) / 1000 for count, (low, high) in zip(histogram, pairwise(bounds), strict=True)
    )
