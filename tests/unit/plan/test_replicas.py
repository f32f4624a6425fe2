"""The slow decision, one tick at a time."""

from dataclasses import replace
from typing import Any

import pytest

from prism_operator.plan import budget, replicas
from prism_operator.plan.recommendation import Asked, Recommendation, flat
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    DemandState,
    LoopSettings,
    PodView,
    Reason,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
    Status,
)
from tests.unit.plan.factories import demand_of, observation, pod, service_policy, starting_pod

NAME, NOW_S = "interactive", 1000.0
FULL_HISTORY = ReplicaState(since_s=0.0)
"""One pod holds 5.6 requests a second at `full` and 9.0 at `b500`."""


def _decide(
    per_s: int,
    pods: int | tuple[PodView, ...] = 1,
    policy: ServicePolicy | None = None,
    state: ReplicaState = FULL_HISTORY,
    **changes: Any,
) -> tuple[ReplicaPlan, ReplicaState]:
    policy = policy or service_policy()
    history = replace(demand_of(policy, per_s, NOW_S), since_s=0.0)
    return replicas.decide(observation(NOW_S, pods, **changes), history, policy, state)


def test_first_order_is_the_minimum() -> None:
    policy = service_policy(scaling={"minReplicas": 2, "maxReplicas": 3})
    seen = observation(NOW_S, (), ordered_replicas=None)
    plan, _ = replicas.decide(seen, DemandState(), policy, ReplicaState())
    assert (plan.status, plan.replicas) == (Status.PROGRESS, 2)


def test_demand_beyond_capacity_orders_what_it_needs() -> None:
    plan, state = _decide(9)
    assert (plan.status, plan.reason, plan.replicas) == (Status.PROGRESS, Reason.DEMAND, 2)
    assert state.ordered_for == 2


def test_demand_that_fits_changes_nothing_and_says_why_not_fewer() -> None:
    plan, _ = _decide(9, pods=2)
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.STEADY, 2)
    assert "rejected 1: would not hold it" in plan.message


def test_ask_that_the_floors_hold_must_last_through_the_up_window() -> None:
    state = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 10, flat(1, 1)),))
    floors_hold = 6
    plan, _ = _decide(floors_hold, state=state)
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.STABILIZING, 1)
    lasting = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 10, flat(2, 2)),))
    assert _decide(floors_hold, state=lasting)[0].replicas == 2


@pytest.mark.parametrize(("needed_before", "ordered"), [(9.5, 10), (10.2, 11)])
def test_ask_for_little_more_than_what_is_ordered_must_last_through_the_down_window(
    needed_before: float, ordered: int
) -> None:
    """58 requests a second need 10.35 pods at full: within a tenth of the ten there are, and the floors hold them."""
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 20, "headroom": "0.10"})
    earlier = Asked(up=11, at_once=10, nominal=needed_before)
    window = tuple(Recommendation(NOW_S - 30 * age, earlier) for age in range(9, 0, -1))
    plan, _ = _decide(58, 10, policy, replace(FULL_HISTORY, recommendations=window))
    assert plan.replicas == ordered
    assert (plan.reason is Reason.STABILIZING) is (ordered == 10)


def test_much_larger_ask_waits_for_the_up_window_alone() -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 20, "headroom": "0.10"})
    window = (Recommendation(NOW_S - 30, Asked(up=12, at_once=12, nominal=5.0)),)
    assert _decide(66, 10, policy, replace(FULL_HISTORY, recommendations=window))[0].replicas == 12


def test_ask_that_not_even_the_floors_hold_waits_for_nothing() -> None:
    state = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 10, flat(1, 1)),))
    floors_do_not_hold = 10
    assert _decide(floors_do_not_hold, state=state)[0].replicas == 2


def test_ask_waits_for_nothing_where_the_budget_may_not_be_moved_and_the_load_does_not_fit() -> None:
    state = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 10, flat(1, 1)),))
    knob_off = service_policy(budget={"control": "Off"})
    assert _decide(6, state=state, policy=knob_off)[0].replicas == 2


@pytest.mark.parametrize(("per_s", "since_s", "urgent"), [(9, 6.0, True), (9, 5.0, False), (6, 6.0, False)])
def test_fast_loop_hurries_an_order_while_the_load_does_not_fit_at_the_floors(
    per_s: int, since_s: float, urgent: bool
) -> None:
    policy = service_policy()
    memory = BudgetState({NAME: ClassBudgetState("b500", NOW_S - 100)})
    pods = (pod(point="b500"),)
    plan, _ = budget.decide(observation(NOW_S, pods), demand_of(policy, per_s, NOW_S), policy, memory)
    assert replicas.urgent(plan, policy, since_s, ordered=1) is urgent


@pytest.mark.parametrize(("granted", "urgent"), [(None, False), (3, False), (2, True)])
def test_what_another_service_waits_for_is_given_up_at_the_next_tick(granted: int | None, urgent: bool) -> None:
    policy = replace(service_policy(), granted_replicas=granted)
    plan, _ = budget.decide(
        observation(NOW_S, 3), demand_of(policy, 1, NOW_S), policy, BudgetState({NAME: ClassBudgetState("full", 0.0)})
    )
    assert replicas.urgent(plan, policy, 1.0, ordered=3) is urgent


def test_maximum_limits_and_is_named() -> None:
    plan, _ = _decide(40, pods=3)
    assert (plan.status, plan.reason, plan.replicas) == (Status.BLOCKED, Reason.MAX_REPLICAS, 3)
    assert plan.limited_by is Reason.MAX_REPLICAS
    assert plan.recommended > 3


def test_cost_cap_limits_and_is_named() -> None:
    policy = service_policy(cost={"maxPerHour": "5"})
    plan, _ = _decide(40, pods=1, policy=policy)
    assert (plan.replicas, plan.limited_by) == (2, Reason.COST_CAP)


def test_one_decision_adds_at_most_max_step() -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 100, "maxStep": 2})
    plan, _ = _decide(200, policy=policy)
    assert (plan.replicas, plan.limited_by) == (3, Reason.STEP_CAP)


def test_no_second_order_while_pods_start_for_the_same_ask() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 20))
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 9, "maxStep": 1})
    plan, _ = _decide(20, pods, policy, replace(FULL_HISTORY, ordered_for=9))
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.IN_FLIGHT, 2)


def test_higher_ask_adds_the_difference_while_pods_start() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 20))
    plan, _ = _decide(12, pods, state=replace(FULL_HISTORY, ordered_for=2))
    assert plan.replicas == 3


def test_what_the_up_window_cut_off_is_added_while_pods_start() -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 9})
    begun = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 10, flat(3, 3)),))
    plan, state = _decide(17, 2, policy, begun)
    asked = state.recommendations[-1].asked.up
    assert plan.replicas == 3 < asked, "asked for throughout the up window are three"
    later = replace(state, recommendations=state.recommendations[-1:])
    pods = (pod("a"), pod("b"), starting_pod("c", NOW_S - 5))
    assert _decide(17, pods, policy, later)[0].replicas == asked


def test_pod_that_starts_for_too_long_is_reported_and_not_waited_for() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 300))
    plan, _ = _decide(12, pods, state=replace(FULL_HISTORY, ordered_for=3))
    assert plan.stuck_pods == ("pod-1",)
    assert plan.replicas == 3, "no longer in flight, so the ask is answered"


def test_measured_start_times_decide_what_too_long_is() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 50))
    assert _decide(9, pods)[0].stuck_pods == ()
    assert _decide(9, pods, pod_ready_times_s=(20.0, 15.0))[0].stuck_pods == ("pod-1",)


def test_stuck_pod_does_not_block_scale_down() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 600))
    plan, _ = _decide(1, pods)
    assert (plan.status, plan.replicas) == (Status.PROGRESS, 1)


def test_scale_down_takes_one_pod_and_then_waits() -> None:
    plan, state = _decide(1, pods=3)
    assert (plan.status, plan.replicas) == (Status.PROGRESS, 2)
    plan, _ = _decide(1, pods=2, state=state)
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.STABILIZING, 2)


def test_peak_of_the_down_window_holds_replicas() -> None:
    state = replace(FULL_HISTORY, recommendations=(Recommendation(NOW_S - 200, flat(2, 2)),))
    plan, _ = _decide(1, pods=2, state=state)
    assert (plan.reason, plan.replicas) == (Reason.STABILIZING, 2)
    assert "down window" in plan.message


def test_no_scale_down_after_a_restart_until_the_history_is_full() -> None:
    plan, _ = _decide(0, pods=3, state=ReplicaState())
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.STABILIZING, 3)
    assert "history" in plan.message


def test_zero_arrivals_in_fresh_reports_scale_down() -> None:
    plan, _ = _decide(0, pods=3)
    assert plan.replicas == 2


def test_unknown_load_is_not_zero() -> None:
    plan, _ = replicas.decide(observation(NOW_S, 3), DemandState(since_s=0.0), service_policy(), FULL_HISTORY)
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.SIGNALS_STALE, 3)


def test_mostly_silent_pods_freeze_the_count() -> None:
    pods = (pod("a"), pod("b", stale=True), pod("c", stale=True))
    assert _decide(0, pods)[0].reason is Reason.SIGNALS_STALE


def test_n_minus_one_must_hold_the_load_with_headroom() -> None:
    """5 requests a second need 0.89 replicas at full: 0.98 with headroom, so one pod holds them; 6 do not fit one."""
    assert _decide(5, pods=2)[0].replicas == 1
    assert _decide(6, pods=2)[0].replicas == 2


@pytest.mark.parametrize(("control", "reason"), [("External", Reason.EXTERNAL), ("Fixed", Reason.PINNED)])
def test_count_that_others_own_is_passed_on_and_only_recommended_upon(control: str, reason: Reason) -> None:
    policy = service_policy(replicas=1, scaling={"control": control})
    plan, _ = _decide(12, policy=policy)
    assert (plan.reason, plan.replicas, plan.recommended) == (reason, 1, 3)


def test_paused_holds_what_is_ordered() -> None:
    plan, _ = _decide(20, pods=2, policy=service_policy(mode="Paused"))
    assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.PAUSED, 2)


def test_count_outside_a_new_spec_is_brought_inside_at_once() -> None:
    assert _decide(1, pods=5)[0].replicas == 3
    policy = service_policy(scaling={"minReplicas": 2, "maxReplicas": 3})
    assert _decide(1, pods=1, policy=policy)[0].replicas == 2


def test_without_profile_saturation_decides() -> None:
    policy = service_policy()
    history = replace(demand_of(policy, 5, NOW_S, tpot_ms=180.0), since_s=0.0)
    plan, _ = replicas.decide(observation(NOW_S, (pod(profile=None),)), history, policy, FULL_HISTORY)
    assert (plan.replicas, plan.recommended) == (2, 2)
    assert "no profile" in plan.message


def test_without_profile_pods_that_start_are_credited() -> None:
    policy = service_policy()
    history = replace(demand_of(policy, 5, NOW_S, tpot_ms=180.0), since_s=0.0)
    pods = (pod(profile=None), starting_pod("pod-1", NOW_S - 20))
    plan, _ = replicas.decide(observation(NOW_S, pods), history, policy, FULL_HISTORY)
    assert plan.replicas == 2


def test_pod_ready_time_is_an_average_that_follows_the_newest() -> None:
    policy = service_policy(LoopSettings(pod_ready_s=77.0))
    assert replicas.expected_ready_s(observation(NOW_S), policy) == 77.0
    seen = observation(NOW_S, pod_ready_times_s=(100.0, 20.0))
    assert replicas.expected_ready_s(seen, policy) == pytest.approx(76.0)


def test_plan_prints_as_one_line() -> None:
    plan, _ = _decide(9)
    assert str(plan).startswith("replicas Progress Demand: 2 (recommended 2); ")
    assert "\n" not in str(plan)
