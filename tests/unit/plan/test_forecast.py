"""Forecasts: a method is believed for what it achieved, and for nothing else."""

import math
import random
from collections.abc import Callable

import pytest

from prism_operator.plan import forecast
from prism_operator.plan.forecast import BUCKET_S, PENDING_MOST, SCORED, SEASON_S, ForecastState, Method

PERIOD_S, HORIZON_S = 30.0, 120.0


def _learn(
    rate: Callable[[float], float], seconds: float, period_s: float = PERIOD_S, horizon_s: float = HORIZON_S
) -> ForecastState:
    state = ForecastState()
    for tick in range(int(seconds / period_s)):
        state = forecast.update(state, tick * period_s, rate(tick * period_s), horizon_s, period_s)
    return state


def _ahead(state: ForecastState, method: Method, horizon_s: float = HORIZON_S) -> float:
    value = forecast.ahead(state, method, horizon_s, PERIOD_S)
    assert value is not None
    return value


def test_nothing_is_forecast_before_the_first_rate() -> None:
    assert forecast.ahead(ForecastState(), Method.LAST, HORIZON_S, PERIOD_S) is None
    assert forecast.best(ForecastState()) is Method.LAST


def test_last_value_is_believed_until_enough_forecasts_came_due() -> None:
    late = HORIZON_S / PERIOD_S + SCORED
    assert forecast.best(_learn(lambda s: s, (late - 1) * PERIOD_S)) is Method.LAST
    assert forecast.best(_learn(lambda s: s, (late + 1) * PERIOD_S)) is Method.HOLT


def test_trend_is_extrapolated_and_damped() -> None:
    state = _learn(lambda s: s / PERIOD_S, 6000.0)
    gain = _ahead(state, Method.HOLT) - _ahead(state, Method.LAST)
    assert 0 < gain < HORIZON_S / PERIOD_S, "damped: less than the straight line"
    far = _ahead(state, Method.HOLT, 10_000.0) - _ahead(state, Method.LAST)
    assert far < 10 * state.trend_per_s, "the sum of a damped trend is finite"


def test_falling_load_is_never_forecast_below_zero() -> None:
    state = _learn(lambda s: max(0.0, 10.0 - s / 30.0), 330.0)
    assert _ahead(state, Method.HOLT, 600.0) == 0.0


def test_noise_without_trend_keeps_the_last_value_or_errs_no_more() -> None:
    noise = random.Random(5)
    state = _learn(lambda s: 10.0 + noise.gauss(0.0, 1.0), 60_000.0)
    errors = {method: forecast.mean_error(state, method) for method in (Method.LAST, Method.HOLT)}
    assert errors[forecast.best(state)] == min(errors.values(), key=lambda error: error or math.inf)
    assert abs(_ahead(state, Method.HOLT) - state.rate_per_s) < 3.0


def test_daily_cycle_is_learned_on_the_second_day() -> None:
    def daily(at_s: float) -> float:
        return 10.0 + 8.0 * math.sin(2 * math.pi * at_s / SEASON_S)

    horizon_s = 3600.0
    state = _learn(daily, 1.6 * SEASON_S, period_s=60.0, horizon_s=horizon_s)
    assert forecast.best(state) is Method.SEASON
    assert state.at_s is not None
    expected = forecast.ahead(state, Method.SEASON, horizon_s, 60.0)
    assert expected == pytest.approx(daily(state.at_s + horizon_s), abs=0.2)


def test_season_is_silent_about_hours_it_never_saw() -> None:
    state = _learn(lambda s: 5.0, 5 * BUCKET_S)
    assert forecast.ahead(state, Method.SEASON, HORIZON_S, PERIOD_S) is None


def test_a_long_pause_forgets_the_trend_and_not_the_profile_of_the_day() -> None:
    state = _learn(lambda s: s, 2 * BUCKET_S + 60.0)
    assert state.at_s is not None
    later = forecast.update(state, state.at_s + 7200.0, 3.0, HORIZON_S, PERIOD_S)
    assert (later.trend_per_s, later.rate_per_s) == (0.0, 3.0)
    assert later.season_per_s[:1] == state.season_per_s[:1]


def test_repeated_tick_changes_nothing() -> None:
    state = _learn(lambda s: s, 300.0)
    assert state.at_s is not None
    assert forecast.update(state, state.at_s, 99.0, HORIZON_S, PERIOD_S) is state


def test_memory_is_bounded() -> None:
    state = _learn(lambda s: 1.0, 3 * SEASON_S / 10, horizon_s=3600.0)
    assert len(state.pending) <= PENDING_MOST
    assert forecast.mean_error(state, Method.LAST) == 0.0, "although more forecasts were due than may wait"
    assert all(len(errors) <= SCORED for errors in state.errors.values())
