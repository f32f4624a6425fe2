"""Which candidates become operating points, on tables small enough to check by hand."""

import numpy as np
import pytest

from prism_runtime.refactor.bootstrap import Resampling
from prism_runtime.refactor.points import Candidates, Run, count_points, distinct, hull, isotonic, kl_at, stable

DOMAINS = ["a"] * 4 + ["b"] * 4


def candidates(cost: list[float], kl: list[list[float]]) -> Candidates:
    return Candidates(np.array(cost), np.array(cost), np.array(kl))


def test_a_point_above_the_line_between_its_neighbours_is_not_on_the_hull() -> None:
    assert hull(np.array([1.0, 0.5, 0.75, 0.25]), np.array([0.0, 0.2, 0.15, 1.0])) == [3, 1, 0]


def test_the_hull_ends_at_the_cheapest_of_the_best_points() -> None:
    assert hull(np.array([0.2, 0.5, 0.8, 1.0]), np.array([1.0, 0.1, 0.1, 0.3])) == [0, 1]


def test_of_two_candidates_of_one_cost_the_better_is_on_the_hull() -> None:
    assert hull(np.array([0.5, 0.5, 1.0]), np.array([0.4, 0.2, 0.0])) == [1, 2]


def test_a_point_whose_difference_could_be_chance_is_not_distinct() -> None:
    noise = [0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1]
    kl = [[0.0] * 8, [0.5] * 8, [0.5 + each for each in noise], [1.0] * 8]
    assert distinct(candidates([1.0, 0.75, 0.5, 0.25], kl), Resampling(DOMAINS)) == [3, 1, 0]


def test_a_point_that_costs_what_its_neighbour_costs_is_not_distinct() -> None:
    kl = [[0.0] * 8, [0.5] * 8, [1.0] * 8]
    assert distinct(candidates([1.0, 0.755, 0.75], kl), Resampling(DOMAINS)) == [1, 0]


def test_a_point_that_one_run_orders_otherwise_is_not_stable() -> None:
    nominal = np.array([0.25, 0.5, 1.0])
    steady = Run(nominal, np.array([0.3, 0.1, 0.0]))
    swapped = Run(nominal, np.array([0.1, 0.2, 0.0]))
    assert stable(nominal, [0, 1, 2], [steady, steady, steady]) == [0, 1, 2]
    assert stable(nominal, [0, 1, 2], [steady, swapped, steady]) == [1, 2]


def test_a_point_that_misses_its_budget_in_one_run_is_not_stable() -> None:
    nominal = np.array([0.25, 0.5, 1.0])
    kl = np.array([0.3, 0.1, 0.0])
    late = Run(np.array([0.25, 0.511, 1.0]), kl)
    assert stable(nominal, [0, 1, 2], [Run(nominal, kl), late, late]) == [0, 2]


def test_two_runs_are_too_few_to_call_a_point_stable() -> None:
    run = Run(np.array([1.0]), np.array([0.0]))
    with pytest.raises(ValueError, match="at least 3 runs over seeds and texts; found 2"):
        stable(np.array([1.0]), [0], [run, run])


def test_neighbours_in_the_wrong_order_share_their_mean_after_isotonic_regression() -> None:
    assert isotonic(np.array([3.0, 1.0, 2.0, 0.0])).tolist() == [3.0, 1.5, 1.5, 0.0]


def test_a_count_reports_raw_rises_and_a_monotone_curve() -> None:
    cost = [1.0, 0.75, 0.5, 0.25]
    kl = [[0.0] * 8, [0.3] * 8, [0.2] * 8, [1.0] * 8]
    means = np.array([0.0, 0.3, 0.2, 1.0])
    counted = count_points(candidates(cost, kl), DOMAINS, [Run(np.array(cost), means)] * 3)
    assert (counted.rises, round(counted.largest_rise, 6)) == (1, 0.1)
    assert counted.monotone_kl.tolist() == [0.0, 0.25, 0.25, 1.0]
    assert counted.hull == counted.distinct == counted.stable == [3, 2, 0]


def test_a_single_run_leaves_stability_open() -> None:
    assert count_points(candidates([1.0, 0.5], [[0.0] * 8, [0.5] * 8]), DOMAINS).stable is None


def test_kl_between_two_costs_is_read_off_their_line_in_log_kl() -> None:
    cost, kl = np.array([0.5, 0.25, 1.0]), np.array([0.01, 0.04, 0.0])
    assert kl_at(cost, kl, 0.375) == pytest.approx(0.02)
    assert kl_at(cost, kl, 0.25) == pytest.approx(0.04)
    assert kl_at(cost, kl, 0.5) == pytest.approx(0.01)
    assert kl_at(cost, kl, 0.6) is None


def test_kl_between_two_costs_is_read_off_for_each_sequence() -> None:
    kl = np.array([[0.01, 0.0], [0.04, 0.5]])
    between = kl_at(np.array([0.5, 0.25]), kl, 0.375)
    assert between is not None
    assert between[0] == pytest.approx(0.02)
    assert between[1] < 1e-100
