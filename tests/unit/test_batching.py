"""Policies: who shares a step at which operating points, and who starts first. No engine, no model, no clock."""

import itertools
import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.backlog import Ahead, Backlog
from prism_runtime.engine.batching import Arrangement, Fifo, Outlook, Paper, Slack, deadline_s
from prism_runtime.engine.blocks import Context
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.sequence import Sequence
from prism_runtime.engine.types import Promise, Request, Sampling
from tests.unit.test_governor import NAMES, make_ladder

FULL = len(NAMES) - 1
MS = 10**6
READ_MS = 0.1
ids = itertools.count()


def costs() -> StepCosts:
    """10 ms a step; a sequence 1 ms at the smallest budget and 1 ms more with each point; a prompt token 0.1 ms."""
    points = {
        name: PointProfile(
            step_base_nanoseconds=10 * MS,
            step_per_sequence_nanoseconds=(point + 1) * MS,
            step_per_kilotoken_nanoseconds=0,
            prefill_base_nanoseconds=0,
            prefill_per_token_nanoseconds=round(READ_MS * MS),
        )
        for point, name in enumerate(NAMES)
    }
    profile = Profile(
        accelerator="x", provenance="x", max_sequences=8, kv_tokens=4096, prefill_tokens_per_step=100, points=points
    )
    priced = StepCosts(make_ladder())
    priced.take(profile)
    return priced


def sequence(
    *, ttft_s: float | None = None, tpot_s: float | None = None, floor: int | None = 0, priority: int = 0,
    arrived_s: float = 0.0, first_token_s: float | None = None, generated: int = 0, prompt: int = 10,
) -> Sequence:  # fmt: skip
    """Waiting, or decoding if it has generated tokens."""
    number = next(ids)
    promise = Promise(ttft_s, tpot_s, floor)
    request = Request(f"r{number}", (1,) * prompt, Sampling(50), priority=priority, promise=promise)
    one = Sequence(request, (-priority, number), arrived_s, [1] * (prompt + generated), random.Random(0))
    if generated:
        one.to_read, one.first_token_s = prompt, 0.0 if first_token_s is None else first_token_s
        one.context = Context([], prompt + generated - 1, [], [])
    return one


def outlook(
    decoding: list[Sequence],
    waiting: list[Sequence] | None = None,
    *,
    now_s: float = 0.0,
    free: int = 8,
    top: int = FULL,
) -> Outlook:
    return Outlook(now_s, decoding, [], waiting or [], free, lambda one: top, most_read=100)


def step_ms(arrangement: Arrangement, read: int = 0) -> float:
    return 10 + sum(arrangement.point_of(one) + 1 for one in arrangement.decode) + read * READ_MS


def test_with_slack_everybody_runs_where_their_class_stands() -> None:
    decoding = [sequence(tpot_s=0.1, generated=1), sequence(tpot_s=0.1, generated=1, floor=FULL)]
    arrangement = Slack(costs()).arrange(outlook(decoding))
    assert [arrangement.point_of(one) for one in decoding] == [FULL, FULL]
    assert arrangement.decode == decoding
    assert arrangement.most_read == 100


def test_without_slack_the_lowest_priority_is_lowered_first_and_only_as_far_as_needed() -> None:
    gold, silver, bulk = (sequence(tpot_s=0.0221, generated=1, priority=priority) for priority in (9, 5, 0))
    arrangement = Slack(costs()).arrange(outlook([gold, silver, bulk]))
    assert [arrangement.point_of(one) for one in (gold, silver, bulk)] == [FULL, FULL, FULL - 3]
    assert step_ms(arrangement) == 22
    tighter = [sequence(tpot_s=0.0181, generated=1, priority=priority) for priority in (9, 5, 0)]
    arrangement = Slack(costs()).arrange(outlook(tighter))
    assert [arrangement.point_of(one) for one in tighter] == [FULL, FULL - 3, 0]


def test_time_that_earlier_steps_saved_is_slack() -> None:
    behind, ahead = (sequence(tpot_s=0.012, generated=generated) for generated in (1, 2))
    assert Slack(costs()).arrange(outlook([ahead])).point_of(ahead) == FULL
    assert Slack(costs()).arrange(outlook([behind])).point_of(behind) == 1


def test_one_whose_promise_is_broken_is_lowered_before_others_of_its_priority() -> None:
    kept = sequence(ttft_s=1.0, tpot_s=0.017, generated=1, first_token_s=0.9)
    broken = sequence(ttft_s=1.0, tpot_s=None, generated=1, first_token_s=1.1)
    arrangement = Slack(costs()).arrange(outlook([kept, broken], now_s=0.9))
    assert [arrangement.point_of(one) for one in (kept, broken)] == [FULL, FULL - 3]


def test_a_queue_whose_first_tokens_would_be_late_lowers_budgets_too() -> None:
    bulk = sequence(generated=1)
    waiting = [sequence(ttft_s=0.073, floor=FULL, prompt=100) for _ in range(3)]
    assert Slack(costs()).arrange(outlook([bulk])).point_of(bulk) == FULL
    arrangement = Slack(costs()).arrange(outlook([bulk], waiting))
    assert arrangement.point_of(bulk) < FULL
    assert all(arrangement.point_of(one) == FULL for one in waiting)


def test_a_full_pod_lowers_budgets_so_that_places_get_free_in_time() -> None:
    bulk = sequence(generated=40)
    waiting = [sequence(ttft_s=0.16, floor=FULL)]
    assert Slack(costs()).arrange(outlook([bulk], waiting, free=1)).point_of(bulk) == FULL
    assert Slack(costs()).arrange(outlook([bulk], waiting, free=0)).point_of(bulk) < FULL


def test_where_floors_do_not_help_a_step_reads_less_but_never_nothing() -> None:
    gold = sequence(tpot_s=0.020, generated=1, floor=FULL)
    arrangement = Slack(costs()).arrange(outlook([gold], [sequence(prompt=500)]))
    assert step_ms(arrangement, arrangement.most_read) == pytest.approx(20, abs=2 * READ_MS)
    hopeless = sequence(tpot_s=0.001, generated=1, floor=FULL)
    assert Slack(costs()).arrange(outlook([hopeless], [sequence(prompt=500)])).most_read == 13


def test_without_costs_nothing_is_foreseen() -> None:
    decoding = [sequence(tpot_s=0.001, generated=1)]
    arrangement = Slack(StepCosts(make_ladder())).arrange(outlook(decoding, top=3))
    assert arrangement.point_of(decoding[0]) == 3
    assert arrangement.most_read == 100


sequences = st.builds(
    sequence,
    tpot_s=st.none() | st.floats(0.001, 0.1),
    ttft_s=st.none() | st.floats(0.001, 1.0),
    floor=st.none() | st.integers(0, FULL),
    priority=st.integers(-1, 1),
    generated=st.integers(1, 5),
    prompt=st.integers(1, 300),
)


@given(st.lists(sequences, max_size=8), st.lists(sequences, max_size=8), st.integers(0, FULL), st.floats(0, 1))
def test_points_stay_between_floor_and_top_and_lower_priorities_never_stand_higher_in_their_range(
    decoding: list[Sequence], others: list[Sequence], top: int, now_s: float
) -> None:
    waiting = [replace(one, context=None, first_token_s=None) for one in others]
    arrangement = Slack(costs()).arrange(outlook(decoding, waiting, now_s=now_s, top=top))
    assert arrangement.most_read >= 1
    for one in (*decoding, *waiting):
        floor = top if one.request.promise.floor is None else min(top, one.request.promise.floor)
        assert floor <= arrangement.point_of(one) <= top
        if arrangement.point_of(one) < top:
            for lower in (*decoding, *waiting):
                if lower.request.priority < one.request.priority:
                    floor = top if lower.request.promise.floor is None else min(top, lower.request.promise.floor)
                    assert arrangement.point_of(lower) == floor


def test_a_request_that_can_still_be_in_time_starts_before_one_of_its_priority_that_is_late() -> None:
    late, punctual = sequence(ttft_s=0.01), sequence(ttft_s=1.0)
    policy = Slack(costs())
    assert policy.first([late, punctual], now_s=0.5, starts=0) is punctual
    assert policy.first([late, punctual], now_s=0.0, starts=0) is punctual, "its prompt takes 11 ms"
    early = sequence(ttft_s=0.6)
    assert policy.first([late, punctual, early], now_s=0.5, starts=0) is early
    assert policy.first([punctual, sequence(ttft_s=0.01, priority=1)], now_s=0.5, starts=0).request.priority == 1


def test_one_start_in_eight_goes_by_rank_alone() -> None:
    late, punctual = sequence(ttft_s=0.01), sequence(ttft_s=1.0)
    chosen = [Slack(costs()).first([late, punctual], now_s=0.5, starts=starts) for starts in range(16)]
    assert [one is late for one in chosen] == ([False] * 7 + [True]) * 2


def test_fifo_starts_by_arrival_and_runs_everybody_at_the_highest_point_among_them() -> None:
    first, second = sequence(priority=0), sequence(priority=9)
    policy = Fifo(costs())
    assert policy.first([second, first], now_s=0.0, starts=0) is first
    tops = {first: 1, second: 3}
    arrangement = policy.arrange(replace(outlook([first, second]), top=tops.__getitem__))
    assert [arrangement.point_of(one) for one in (first, second)] == [3, 3]


def test_paper_runs_the_queue_with_the_most_tokens_for_its_cost() -> None:
    gold, bulk = sequence(generated=1, floor=FULL), [sequence(generated=1) for _ in range(6)]
    arrangement = Paper(costs()).arrange(outlook([gold, *bulk]))
    assert arrangement.decode == bulk  # 6 tokens in 16 ms, or 7 in 45 ms
    assert {arrangement.point_of(one) for one in bulk} == {0}
    crowd = [sequence(generated=1, floor=FULL) for _ in range(6)]
    arrangement = Paper(costs()).arrange(outlook([*crowd, bulk[0]]))
    assert arrangement.decode == [*crowd, bulk[0]]  # 1 token in 11 ms, or 7 in 45 ms, those of lower floors upgraded
    assert arrangement.point_of(bulk[0]) == FULL


def test_paper_runs_who_has_waited_too_long_and_a_queue_that_fills_the_batch() -> None:
    gold, bulk = sequence(generated=1, floor=FULL), [sequence(generated=1) for _ in range(6)]
    policy = Paper(costs(), longest_wait_s=0.5)
    assert gold not in policy.arrange(outlook([gold, *bulk], now_s=0.2)).decode
    assert gold in policy.arrange(outlook([gold, *bulk], now_s=0.6)).decode
    assert gold not in policy.arrange(outlook([gold, *bulk], now_s=0.7)).decode
    crowd = [sequence(generated=1, floor=FULL) for _ in range(6)]
    assert Paper(costs()).arrange(outlook([*crowd, bulk[0]], free=0)).point_of(bulk[0]) == FULL


def test_deadlines_are_of_the_first_token_then_of_the_mean_time_of_those_after_it() -> None:
    assert deadline_s(sequence(ttft_s=0.5, arrived_s=1.0)) == 1.5
    assert deadline_s(sequence(ttft_s=0.5, tpot_s=0.1, generated=3, first_token_s=2.0)) == pytest.approx(2.3)
    assert deadline_s(sequence()) == deadline_s(sequence(ttft_s=0.5, generated=1)) == inf


def test_costs_follow_the_machine_and_one_odd_step_moves_them_little() -> None:
    priced = costs()
    assert priced.seconds({0: 2}, 0, {}) == pytest.approx(0.012)
    assert priced.reading_seconds(2, 50) == pytest.approx(priced.seconds({}, 0, {2: 50})) == pytest.approx(0.015)
    priced.observe({0: 2}, 0, {}, 12.0)
    assert priced.factor == pytest.approx(1.2)
    for _ in range(100):
        priced.observe({0: 2}, 0, {0: 100}, 0.044)
    assert priced.factor == pytest.approx(2.0, rel=0.01)
    assert priced.seconds({FULL: 1}, 0, {}) == pytest.approx(0.030, rel=0.01)


def test_a_new_request_waits_until_those_of_its_priority_are_read_and_have_left_it_a_place() -> None:
    reading, gold, bulk = sequence(prompt=150), sequence(prompt=100, priority=9), sequence(prompt=300)
    decoding = [sequence(generated=45), sequence(generated=30)]
    backlog = Backlog.of(decoding, [reading], [gold, bulk], free=2, most_read=100, step_s=0.01)
    assert backlog.wait_s(9, 50) == pytest.approx(0.03)
    assert backlog.wait_s(0, 50) == pytest.approx(0.06 + 0.05), "550 tokens, and five until the first place is free"
    assert backlog.wait_s(0, 50, [Ahead(0, 100, running=False)]) == pytest.approx(0.07 + 0.20)
    assert Backlog().wait_s(0, 50) is None
    assert Backlog.of(decoding, [reading], [gold, bulk], free=2, most_read=100, step_s=None).wait_s(0, 50) is None


def test_the_price_of_a_step_at_the_floors_is_what_it_would_take_were_everybody_lowered() -> None:
    decoding = [sequence(generated=1), sequence(generated=1, floor=2), sequence(generated=1, floor=FULL)]
    arrangement = Slack(costs()).arrange(outlook(decoding))
    assert [arrangement.point_of(one) for one in decoding] == [FULL] * 3
    assert arrangement.floor_s == pytest.approx(0.010 + 0.001 + 0.003 + 0.005)
