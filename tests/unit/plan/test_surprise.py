"""What load exceeded expectations by within the time that an order takes, weighted by the requests that felt it."""

from prism_operator.plan import surprise
from prism_operator.plan.surprise import REMEMBERED, Excess, SurpriseState

LEAD_S, TICK_S = 120.0, 30.0


def _played(peaks: list[float], expected_per_s: float = 5.0, arrivals: int = 100) -> SurpriseState:
    state = SurpriseState()
    for tick, peak in enumerate(peaks):
        state = surprise.update(state, tick * TICK_S, expected_per_s, peak, arrivals, LEAD_S)
    return state


def test_steady_load_teaches_that_nothing_is_needed() -> None:
    assert surprise.reserve_per_s(_played([5.0] * 60), 0.95) == 0.0


def test_burst_counts_once_with_the_requests_that_it_brought() -> None:
    state = SurpriseState()
    for tick in range(20):
        burst = tick == 10
        state = surprise.update(state, tick * TICK_S, 5.0, 20.0 if burst else 5.0, 400 if burst else 100, LEAD_S)
    assert [one for one in state.seen if one.per_s] == [Excess(15.0, 400)]


def test_nothing_is_learnt_before_a_lead_time_is_over() -> None:
    assert _played([5.0, 20.0, 5.0, 5.0]).seen == ()
    assert _played([5.0, 20.0, 5.0, 5.0, 8.0]).seen == (Excess(3.0, 100),)


def test_peak_is_held_against_what_an_order_in_time_could_have_known() -> None:
    """Expectations rise by 1/s a tick; the last that is a lead time old is four ticks behind."""
    state = SurpriseState()
    for tick in range(8):
        state = surprise.update(state, tick * TICK_S, float(tick), float(tick), 100, LEAD_S)
    assert [one.per_s for one in state.seen] == [4.0] * 4


def test_ticks_that_were_missed_leave_the_last_expectation_that_is_old_enough() -> None:
    state = surprise.update(_played([5.0] * 3), 100 * TICK_S, 5.0, 9.0, 100, LEAD_S)
    assert state.seen == (Excess(4.0, 100),)


def test_rare_burst_of_few_requests_is_left_to_chance_and_one_of_many_is_not() -> None:
    calm = tuple(Excess(0.0, 100) for _ in range(40))
    assert surprise.reserve_per_s(SurpriseState(seen=(*calm, Excess(9.0, 100))), 0.95) == 0.0
    assert surprise.reserve_per_s(SurpriseState(seen=(*calm, Excess(9.0, 1000))), 0.95) == 9.0


def test_higher_attainment_target_reserves_for_rarer_bursts() -> None:
    seen = SurpriseState(seen=tuple(Excess(float(n), 10) for n in range(100)))
    assert [surprise.reserve_per_s(seen, share) for share in (0.5, 0.9, 0.99)] == [49.0, 89.0, 98.0]


def test_load_that_fell_short_is_no_surprise() -> None:
    assert surprise.reserve_per_s(_played([1.0] * 20), 0.95) == 0.0


def test_nothing_seen_reserves_nothing() -> None:
    assert surprise.reserve_per_s(SurpriseState(), 0.95) == 0.0


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    state = _played([5.0] * 5 + [50.0] + [5.0] * REMEMBERED)
    assert len(state.seen) == REMEMBERED
    assert len(state.running) <= LEAD_S / TICK_S + 1
    assert surprise.reserve_per_s(state, 1.0) == 0.0


def test_repeated_tick_counts_once() -> None:
    state = _played([5.0, 20.0])
    assert surprise.update(state, TICK_S, 5.0, 99.0, 1, LEAD_S) == state
