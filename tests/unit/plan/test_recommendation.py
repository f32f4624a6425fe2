"""What lasts of the needs of single ticks."""

import math

import pytest

from prism_operator.plan.recommendation import Asked, Recommendation, flat, kept, lasting, whole


def _history(*asked: Asked) -> list[Recommendation]:
    return [Recommendation(30.0 * position, one) for position, one in enumerate(asked)]


def _needs(nominal: float, burst: float = 0.0) -> Asked:
    return Asked(whole(nominal), whole(nominal), nominal=nominal, kept=1.05 * nominal, burst=burst)


def test_a_minute_that_needed_more_keeps_nothing_where_the_others_needed_less() -> None:
    window = _history(_needs(3.2), _needs(4.2), _needs(3.1), _needs(3.3))
    assert (lasting(window), kept(window)) == (4, 4)
    assert max(one.asked.down for one in window) == 5


def test_need_that_lasts_counts_however_little_it_exceeds_what_is_ordered() -> None:
    assert lasting(_history(*[_needs(4.02)] * 10)) == 5


def test_bursts_are_kept_for_on_average_too() -> None:
    assert kept(_history(_needs(1.0, burst=2.4), _needs(1.0, burst=3.2))) == 3


def test_window_with_a_pause_in_it_keeps_its_largest_need() -> None:
    assert kept(_history(_needs(3.9), flat(0, 0), flat(0, 0), _needs(0.5))) == 5


def test_pause_that_fills_the_window_keeps_nothing() -> None:
    assert kept(_history(flat(0, 0), flat(0, 0))) == 0


def test_least_of_any_tick_is_kept() -> None:
    assert kept(_history(_needs(1.0), flat(3, 3), _needs(1.0))) == 3


def test_needs_where_no_budget_carries_noise_count_one_by_one() -> None:
    alone = flat(4, 5)
    assert (alone.up, alone.at_once, alone.down) == (4, 4, 5)
    assert kept(_history(alone, flat(1, 1))) == 5


@pytest.mark.parametrize(("need", "pods"), [(0.0, 0), (2.0, 2), (2.0 + 1e-12, 2), (2.01, 3), (math.inf, 1_000_000)])
def test_pods_are_whole(need: float, pods: int) -> None:
    assert whole(need) == pods
