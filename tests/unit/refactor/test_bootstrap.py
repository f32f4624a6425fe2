"""Intervals over sequences, on values whose answer is plain."""

import numpy as np
import pytest

from prism_runtime.refactor.bootstrap import Resampling


def test_the_mean_gives_every_domain_the_same_weight() -> None:
    interval = Resampling(["a", "a", "b", "b", "b"]).mean([1.0, 3.0, 10.0, 10.0, 10.0])
    assert interval.value == pytest.approx(6.0)
    assert interval.low == pytest.approx(5.5)
    assert interval.high == pytest.approx(6.5)


def test_a_constant_difference_has_no_spread_however_much_the_sequences_differ() -> None:
    hard = np.array([0.0, 100.0, 3.0, 50.0])
    interval = Resampling(["a", "a", "b", "b"]).difference(hard + 1, hard)
    assert (interval.low, interval.value, interval.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_constant_factor_has_no_spread() -> None:
    hard = np.array([1.0, 100.0, 3.0, 50.0])
    interval = Resampling(["a", "a", "b", "b"]).ratio(7 * hard, hard)
    assert (interval.low, interval.value, interval.high) == pytest.approx((7.0, 7.0, 7.0))


def test_one_seed_gives_one_interval() -> None:
    values = [1.0, 2.0, 5.0, 9.0]
    assert Resampling(["a"] * 4, seed=3).mean(values) == Resampling(["a"] * 4, seed=3).mean(values)


def test_a_domain_of_one_sequence_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'b' has 1"):
        Resampling(["a", "a", "b"])


def test_values_of_another_number_of_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 2 sequences; found \\[3\\]"):
        Resampling(["a", "a"]).mean([1.0, 2.0, 3.0])
