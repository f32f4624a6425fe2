"""Whole runs of both loops: restarts, serialised states, steps of load, and a cap that services share."""

import itertools
import random
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from prism_operator.plan import fleet
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.fleet import Caps
from prism_operator.plan.surprise import REMEMBERED
from prism_operator.plan.types import BudgetState, DemandState, Lengths, ReplicaState
from tests.property.plan.loop import NAME, TICK_S, Loop, loop_policy
from tests.unit.plan.factories import POINTS, profile

LADDER = list(POINTS)


def _round_trip(state: Any) -> Any:
    adapter = TypeAdapter(type(state))
    return adapter.validate_json(adapter.dump_json(state))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 400))
def test_states_that_went_through_json_decide_alike(before: int, after: int, seconds: int) -> None:
    loop, restored = Loop(loop_policy()), Loop(loop_policy())
    for one in (loop, restored):
        one.run(before, seconds)
    restored.demand = _round_trip(restored.demand)
    restored.budget = _round_trip(restored.budget)
    restored.state = _round_trip(restored.state)
    assert isinstance(restored.demand, DemandState)
    assert isinstance(restored.budget, BudgetState)
    assert isinstance(restored.state, ReplicaState)
    for one in (loop, restored):
        one.run(after, 120)
    assert [str(plan) for plan in restored.plans] == [str(plan) for plan in loop.plans]
    assert [str(plan) for plan in restored.points] == [str(plan) for plan in loop.points]


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 30), st.integers(300, 600))
def test_restart_under_constant_load_changes_no_decision(per_s: int, seconds: int) -> None:
    """The new process repeats the points and keeps the count, and has nothing to change once its history is full."""
    loop, restarted = Loop(loop_policy()), Loop(loop_policy())
    for one in (loop, restarted):
        one.run(per_s, seconds)
    point, ordered = restarted.point, restarted.ordered
    restarted.restart_operator()
    restarted.tick(per_s)
    assert (restarted.point, restarted.ordered) == (point, ordered)
    for one in (loop, restarted):
        one.run(per_s, 900)
    assert (restarted.point, restarted.ordered) == (loop.point, loop.ordered)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25))
def test_step_of_load_converges_to_what_the_new_load_needs(before: int, after: int) -> None:
    loop = Loop(loop_policy())
    loop.run(before, 600)
    forgotten_s = REMEMBERED * loop.policy.loop.slow_period_s
    loop.run(after, round(forgotten_s) + 600 + 120 * loop.ordered)
    asked = loop.state.recommendations[-1].asked
    assert loop.point == "full", str(loop.points[-1])
    assert max(1, asked.up) <= loop.ordered <= max(1, asked.down), str(loop.plans[-1])
    settled = loop.orders[-1][0] if loop.orders else 0.0
    assert settled < loop.now_s - 60, f"still moving: {loop.orders}"


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40))
def test_more_load_never_gets_fewer_replicas_or_more_quality(one: int, other: int) -> None:
    less, more = Loop(loop_policy()), Loop(loop_policy())
    less.run(min(one, other), 600)
    more.run(max(one, other), 600)
    assert more.ordered >= less.ordered
    for calm, busy in zip(less.points[2:12], more.points[2:12], strict=True):
        levels = [LADDER.index(plan.by_name(NAME).point) for plan in (calm, busy)]
        assert levels[0] >= levels[1], "before the first order is ready the pools are alike"


@pytest.mark.parametrize("per_s", [3, 5, 8, 10, 15, 20, 21, 25, 26, 30])
def test_stationary_noise_of_a_tenth_takes_back_no_step_of_either_knob(per_s: int) -> None:
    """An hour: no replica comes and goes, and no class turns within a minute, up after down or down after up."""
    loop, noise = Loop(loop_policy()), random.Random(per_s)
    loop.run(per_s, 600)
    orders, began = len(loop.orders), len(loop.points)
    for _ in range(720):
        loop.tick(per_s * (1 + noise.uniform(-0.1, 0.1)))
        loop.now_s += TICK_S
    assert len(loop.orders) - orders <= 1, loop.orders
    levels = [LADDER.index(plan.by_name(NAME).point) for plan in loop.points[began - 1 :]]
    moves = [(at * TICK_S, b - a) for at, (a, b) in enumerate(itertools.pairwise(levels)) if a != b]
    turns = [at for (since, one), (at, other) in itertools.pairwise(moves) if one * other < 0 and at - since <= 60]
    assert turns == [], moves


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(4, 12))
def test_services_under_one_cap_never_order_more_than_it_pays_for(rates: list[int], cap: int) -> None:
    loops = [Loop(loop_policy()) for _ in rates]
    granted = None
    for _ in range(60):
        claims = []
        for number, (loop, rate) in enumerate(zip(loops, rates, strict=True)):
            loads = [ClassLoad(loop.policy.classes[0], float(rate), Lengths(64, 32))]
            made = fleet.claim(f"s{number}", loop.policy, loads, profile(), 1)
            assert made is not None
            claims.append(made)
        granted = fleet.arbitrate(claims, Caps(accelerators=cap), granted)
        for number, (loop, rate) in enumerate(zip(loops, rates, strict=True)):
            loop.policy = replace(loop.policy, granted_replicas=max(1, granted.grants[f"s{number}"].replicas))
            loop.run(rate, 30)
        if not granted.unserved:
            assert sum(loop.ordered for loop in loops) <= cap, str(granted)


@pytest.mark.parametrize("cap", ["2.50", "5", "12.50"])
def test_cost_cap_is_never_exceeded_by_any_step_of_a_run(cap: str) -> None:
    loop = Loop(replace(loop_policy(), max_per_hour=Decimal(cap)))
    for per_s in (3, 40, 3, 80):
        loop.run(per_s, 300)
    assert max(count for _, count in [(0.0, 1), *loop.orders]) * Decimal("2.50") <= Decimal(cap)
