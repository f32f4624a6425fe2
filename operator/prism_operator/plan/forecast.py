"""Forecast of one class's arrival rate, as far ahead as an order of replicas takes to have an effect.

Three methods, always all kept up to date, for they cost nothing:

    last      the rate now
    holt      the rate now plus a damped trend: trend * (d + d^2 + ... + d^n) for a horizon of n periods
    season    the rate now plus what the day's profile adds until then: 24 h in 10-minute buckets, averaged over days

A method is believed for what it achieved. Every forecast is kept until its time has come and is then compared with the
rate that was seen; `Auto` takes the method with the smallest mean absolute error over the last 50, and `last` until
there are as many. Reason for the caution: on production traces the last value errs by 3 to 5 % ten minutes ahead, the
same time yesterday by 12 to 21 % (ServeGen, arXiv 2505.09999, m-small and m-mid).

The rate is a mean over a window already, so the level of Holt (1957) and of Winters (1960, additive) is not smoothed a
second time; the trend is, and damped as by Gardner and McKenzie (1985).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

SCORED = 50
"""Forecasts whose errors are averaged, and without which no method but `last` is believed."""
PENDING_MOST = 64
"""Forecasts that wait for their time. With as many waiting no more are made, so that each of them is settled."""
TREND_WEIGHT, SEASON_WEIGHT = 0.2, 0.3
DAMPING = 0.9
"""What is left of a trend after each period."""
SEASON_S, BUCKET_S = 86_400.0, 600.0
BUCKETS = int(SEASON_S / BUCKET_S)


class Method(StrEnum):
    LAST = "last"
    HOLT = "holt"
    SEASON = "season"


@dataclass(frozen=True, slots=True)
class Pending:
    """What each method said about the rate at `due_s`; methods that could not say are absent."""

    due_s: float
    said: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ForecastState:
    """Memory of one class's forecasts; bounded, plain values."""

    at_s: float | None = None
    rate_per_s: float = 0.0
    trend_per_s: float = 0.0
    """Change of the rate in one period."""
    season_per_s: tuple[float | None, ...] = ()
    """Mean rate of each bucket of the day, None for one not seen yet; empty before the first is complete."""
    bucket: int | None = None
    bucket_rates: tuple[float, int] = (0.0, 0)
    """Sum and number of the rates seen in the bucket that is still open."""
    pending: tuple[Pending, ...] = ()
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Method -> absolute errors of its last forecasts, oldest first."""


def update(state: ForecastState, now_s: float, rate_per_s: float, horizon_s: float, period_s: float) -> ForecastState:
    """Learn the rate of one tick of the slow loop, settle what was forecast for it, and forecast once more.

    Equal or earlier `now_s` changes nothing. After a pause longer than the horizon the trend is forgotten: what is
    known of it is older than what it would be used for.
    """
    if state.at_s is not None and now_s <= state.at_s:
        return state
    state = _settled(state, now_s, rate_per_s)
    state = _learned(state, now_s, rate_per_s, horizon_s, period_s)
    if len(state.pending) == PENDING_MOST:
        return state
    said = {method.value: ahead(state, method, horizon_s, period_s) for method in Method}
    known = {name: value for name, value in said.items() if value is not None}
    return replace(state, pending=(*state.pending, Pending(now_s + horizon_s, known)))


def ahead(state: ForecastState, method: Method, horizon_s: float, period_s: float) -> float | None:
    """What a method expects `horizon_s` after the last update, never below 0; None if it cannot say yet."""
    if state.at_s is None:
        return None
    if method is Method.LAST:
        return state.rate_per_s
    if method is Method.HOLT:
        periods = max(0.0, horizon_s / period_s)
        return max(0.0, state.rate_per_s + state.trend_per_s * DAMPING * (1 - DAMPING**periods) / (1 - DAMPING))
    now, then = _usual(state, state.at_s), _usual(state, state.at_s + horizon_s)
    return None if now is None or then is None else max(0.0, state.rate_per_s + then - now)


def best(state: ForecastState) -> Method:
    """The method with the smallest mean error; of equal ones the simplest."""
    scored = {method: error for method in Method if (error := mean_error(state, method)) is not None}
    return min(scored, key=lambda method: scored[method], default=Method.LAST)


def mean_error(state: ForecastState, method: Method) -> float | None:
    """Mean absolute error a second of the last forecasts; None before enough of them came due."""
    errors = state.errors.get(method.value, ())
    return sum(errors) / len(errors) if len(errors) >= SCORED else None


def _settled(state: ForecastState, now_s: float, rate_per_s: float) -> ForecastState:
    due = [one for one in state.pending if one.due_s <= now_s]
    if not due:
        return state
    errors = dict(state.errors)
    # Of several that came due in one pause only the newest is about this moment.
    for name, value in due[-1].said.items():
        errors[name] = (*errors.get(name, ()), abs(value - rate_per_s))[-SCORED:]
    return replace(state, pending=tuple(one for one in state.pending if one.due_s > now_s), errors=errors)


def _learned(state: ForecastState, now_s: float, rate_per_s: float, horizon_s: float, period_s: float) -> ForecastState:
    trend = 0.0
    if state.at_s is not None and now_s - state.at_s <= max(horizon_s, 2 * period_s):
        kept = DAMPING * state.trend_per_s
        moved = (rate_per_s - state.rate_per_s) * period_s / (now_s - state.at_s)
        trend = kept + TREND_WEIGHT * (moved - kept)
    return replace(_in_season(state, now_s, rate_per_s), at_s=now_s, rate_per_s=rate_per_s, trend_per_s=trend)


def _in_season(state: ForecastState, now_s: float, rate_per_s: float) -> ForecastState:
    """Add one rate to the open bucket; average the bucket into the day's profile when the next one begins."""
    bucket = _bucket(now_s)
    total, count = state.bucket_rates
    if state.bucket is None or state.bucket == bucket:
        return replace(state, bucket=bucket, bucket_rates=(total + rate_per_s, count + 1))
    season, mean = list(state.season_per_s or (None,) * BUCKETS), total / count
    before = season[state.bucket]
    season[state.bucket] = mean if before is None else before + SEASON_WEIGHT * (mean - before)
    return replace(state, bucket=bucket, bucket_rates=(rate_per_s, 1), season_per_s=tuple(season))


def _usual(state: ForecastState, at_s: float) -> float | None:
    """The day's profile at a time, interpolated between the middles of two buckets; None where one was not seen."""
    if not state.season_per_s:
        return None
    position = at_s / BUCKET_S - 0.5
    earlier = math.floor(position)
    left, right = (state.season_per_s[bucket % BUCKETS] for bucket in (earlier, earlier + 1))
    return None if left is None or right is None else left + (position - earlier) * (right - left)


def _bucket(at_s: float) -> int:
    return int(at_s % SEASON_S // BUCKET_S)
