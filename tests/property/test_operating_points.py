"""Hull, isotonic fit and bootstrap hold their definitions on any table."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime.refactor.bootstrap import Resampling
from prism_runtime.refactor.points import hull, isotonic

VALUES = st.floats(0, 10, allow_nan=False, width=32).map(lambda value: round(value, 3))
TABLES = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12)


@given(TABLES)
def test_no_candidate_lies_below_the_hull_and_its_corners_fall_ever_slower(table: list[tuple[float, float]]) -> None:
    cost, kl = np.array(table).T
    corners = hull(cost, kl)
    x, y = cost[corners], kl[corners]
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) < 0).all()
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) > 0).all()
    assert x[0] == cost.min()
    assert y[-1] == kl.min()
    assert (kl >= np.interp(cost, x, y) - 1e-9).all()


@given(st.lists(VALUES, min_size=1, max_size=12))
def test_the_isotonic_fit_never_rises_keeps_the_mean_and_leaves_a_falling_curve_alone(values: list[float]) -> None:
    given_values = np.array(values)
    fitted = isotonic(given_values)
    assert (np.diff(fitted) <= 0).all()
    assert np.isclose(fitted.mean(), given_values.mean())
    falling = np.sort(given_values)[::-1]
    assert np.allclose(isotonic(falling), falling)


@given(st.lists(VALUES, min_size=2, max_size=6), st.data())
def test_no_falling_curve_is_nearer_than_the_isotonic_fit(values: list[float], data: st.DataObject) -> None:
    given_values = np.array(values)
    other = np.sort(data.draw(st.lists(VALUES, min_size=len(values), max_size=len(values)).map(np.array)))[::-1]
    assert ((given_values - isotonic(given_values)) ** 2).sum() <= ((given_values - other) ** 2).sum() + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_an_interval_holds_its_value_and_a_larger_sample_narrows_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    few, many = generator.normal(size=20), generator.normal(size=2000)
    narrow, wide = Resampling(["a"] * 2000, draws=400).mean(many), Resampling(["a"] * 20, draws=400).mean(few)
    assert wide.low <= wide.value <= wide.high
    assert narrow.high - narrow.low < wide.high - wide.low


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(loc=1.0, size=(400, 60))
    domains = ["a"] * 30 + ["b"] * 30
    resampling = Resampling(domains, draws=500)
    held = sum(interval.low <= 1.0 <= interval.high for interval in map(resampling.mean, samples))
    # Percentile intervals of 30 values run a little narrow: 93 % is their known coverage here, 400 samples add 1.3 %.
    assert 0.89 <= held / len(samples) <= 0.98
