"""Bugs that users reported of other autoscalers, each as a test that this planner passes, by project and thread."""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_operator.plan import budget, replicas
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    DemandState,
    Observation,
    PodView,
    Reason,
    ReplicaState,
    Status,
)
from tests.property.plan.loop import Loop, loop_policy
from tests.unit.plan.factories import demand_of, observation, pod, service_policy, starting_pod

NAME, NOW_S = "interactive", 1000.0
FULL_HISTORY = ReplicaState(since_s=0.0)


def test_dynamo_6985_zero_traffic_scales_down_to_the_minimum() -> None:
    loop = Loop(loop_policy(), ordered=4)
    loop.run(0, 300 + 4 * 120)
    assert loop.ordered == 1
    assert [count for _, count in loop.orders] == [3, 2, 1], "one at a time"


@pytest.mark.parametrize("tenths", range(50, 115, 5))
def test_dynamo_9294_no_load_between_one_and_two_replicas_oscillates(tenths: int) -> None:
    loop = Loop(loop_policy())
    loop.run(tenths / 10, 3600)
    assert len(loop.orders) <= 1, f"{tenths / 10}/s: {loop.orders}"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 20), st.integers(0, 60_000), st.integers(1, 6))
def test_dynamo_14296_no_jump_exceeds_the_step_even_under_a_thousandfold_spike(
    ordered: int, per_s: int, step: int
) -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 1000, "maxStep": step})
    history = replace(demand_of(policy, per_s, NOW_S), since_s=0.0)
    plan, _ = replicas.decide(observation(NOW_S, ordered), history, policy, FULL_HISTORY)
    assert -1 <= plan.replicas - ordered <= step, str(plan)


def test_dynamo_14671_a_worker_that_cannot_start_blocks_neither_direction_and_is_named() -> None:
    loop = Loop(loop_policy(), ordered=2)
    loop.broken = {"pod-2"}
    loop.run(14, 600)
    assert any(plan.status is Status.BLOCKED and plan.stuck_pods == ("pod-2",) for plan in loop.plans)
    loop.run(2, 900)
    assert loop.ordered == 1, str(loop.plans[-1])


def test_dynamo_4420_a_count_that_somebody_else_owns_is_obeyed() -> None:
    policy = service_policy(replicas=7, scaling={"control": "External"})
    plan, _ = replicas.decide(observation(NOW_S, 2), demand_of(policy, 1, NOW_S), policy, FULL_HISTORY)
    assert (plan.reason, plan.replicas) == (Reason.EXTERNAL, 7)


def _unknowns() -> list[tuple[str, Observation, DemandState]]:
    """Each input unknown in turn, the others as under heavy load."""
    policy = service_policy()
    history = replace(demand_of(policy, 12, NOW_S, pods=3), since_s=0.0)
    whole = observation(NOW_S, 3)
    silent = tuple(replace(one, stale=True, load=None) for one in whole.pods)
    return [
        ("no report for a while", whole, replace(history, last_s=NOW_S + 30)),
        ("no class was ever reported", whole, DemandState(since_s=0.0, last_s=NOW_S)),
        ("every pod is silent", observation(NOW_S, silent), history),
        ("no pod is ready", observation(NOW_S, tuple(starting_pod(f"p{n}", 0.0) for n in range(3))), history),
        ("no profile, nothing finished", observation(NOW_S, tuple(replace(one, profile=None) for one in whole.pods)),
         DemandState(since_s=0.0, last_s=NOW_S)),
        ("wall clock unknown", replace(whole, unix_s=None), history),
        ("start times unknown", replace(whole, pod_ready_times_s=()), history),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "seen", "history"), _unknowns(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_llmd_1299_unknown_is_never_read_as_zero(what: str, seen: Observation, history: DemandState) -> None:
    policy = service_policy()
    plan, _ = replicas.decide(seen, history, policy, FULL_HISTORY)
    assert plan.replicas == 3, f"{what}: zero load would have scaled down: {plan}"
    state = BudgetState({NAME: ClassBudgetState("b500", -1000.0)})
    points, _ = budget.decide(seen, history, policy, state)
    assert points.by_name(NAME).point == "b500", f"{what}: zero load would have raised the budget: {points}"


def test_llmd_1299_the_list_of_inputs_that_may_be_unknown_is_complete() -> None:
    """A field added to the observation must be thought about here."""
    known = {"now_s", "pods", "classes", "ordered_replicas", "rollout", "pod_ready_times_s", "unix_s"}
    assert {one.name for one in fields(Observation)} == known | {"woken_s", "degraded_left_s"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["ready", "stale", "starting", "deleting"]), max_size=6), st.integers(0, 40))
def test_llmd_1107_every_tick_without_a_move_has_a_reason(kinds: list[str], per_s: int) -> None:
    policy = service_policy()
    plan, _ = replicas.decide(_fleet(kinds), demand_of(policy, per_s, NOW_S), policy, FULL_HISTORY)
    assert plan.message.strip()
    assert plan.status is not Status.BLOCKED or plan.limited_by or plan.stuck_pods, str(plan)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["stale", "starting", "deleting"]), max_size=4))
def test_aibrix_617_pods_that_are_not_ready_do_not_block_the_loop(others: list[str]) -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 20})
    kinds = ["ready"] * 5 + others
    history = replace(demand_of(policy, 60, NOW_S, pods=5), since_s=0.0)
    plan, _ = replicas.decide(_fleet(kinds), history, policy, FULL_HISTORY)
    assert plan.replicas > 5, str(plan)


@settings(max_examples=6, deadline=None)
@given(st.integers(10, 80), st.integers(1, 9))
def test_aibrix_1159_fallen_load_is_followed_within_the_sum_of_the_windows(before: int, after: int) -> None:
    policy = loop_policy()
    loop = Loop(policy)
    loop.run(before, 900)
    high = loop.ordered
    window_s = policy.effective.stabilization_down_s + policy.loop.long_window_s
    # What is uncertain about the profile holds replicas too, and fades within a few of its time constants.
    window_s += 4 * policy.loop.calibration_s
    loop.run(after, window_s + high * policy.loop.down_period_s + 60)
    kept = loop.state.recommendations[-1].asked.down
    assert loop.ordered == max(1, kept), f"{before} -> {after}/s: {loop.plans[-1]}"


def test_kserve_lost_signals_are_said_and_hold_both_knobs() -> None:
    policy = service_policy()
    seen = observation(NOW_S, tuple(pod(f"p{n}", point="b750", stale=True) for n in range(3)))
    history = demand_of(policy, 9, NOW_S - 60)
    plan, _ = replicas.decide(seen, history, policy, FULL_HISTORY)
    points, _ = budget.decide(seen, history, policy, BudgetState({NAME: ClassBudgetState("b750", 0.0)}))
    assert (plan.reason, plan.replicas) == (Reason.SIGNALS_STALE, 3)
    assert (points.status, points.reason) == (Status.BLOCKED, Reason.SIGNALS_STALE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.floats(0, 299))
def test_knative_a_restart_scales_nothing_down_before_its_window_is_full(per_s: int, seconds: float) -> None:
    loop = Loop(loop_policy(), ordered=6)
    loop.run(per_s, seconds)
    assert loop.ordered >= 6, str(loop.plans[-1])


def _fleet(kinds: list[str]) -> Observation:
    views: list[PodView] = []
    for number, kind in enumerate(kinds):
        name = f"pod-{number}"
        if kind == "starting":
            views.append(starting_pod(name, NOW_S - 10))
        else:
            views.append(pod(name, stale=kind == "stale", deleting=kind == "deleting"))
    return observation(NOW_S, tuple(views), ordered_replicas=max(1, sum(kind != "deleting" for kind in kinds)))
