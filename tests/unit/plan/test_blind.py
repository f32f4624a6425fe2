"""What both loops do while fewer than half of the ready pods report."""

from dataclasses import replace
from typing import Any

import pytest

from prism_operator.plan import budget, replicas
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    ClassBudgetState,
    Observation,
    PodView,
    Reason,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
    Status,
)
from tests.unit.plan.factories import demand_of, observation, pod, service_class, service_policy

NAME, NOW_S = "interactive", 1000.0
SILENT = (pod("a", point="b625"), pod("b", point="b625", stale=True), pod("c", point="b625", stale=True))
HEARD = tuple(replace(one, stale=False) for one in SILENT)


def _at(now_s: float, pods: tuple[PodView, ...] = SILENT) -> Observation:
    return observation(NOW_S + now_s, pods)


def _budgets(policy: ServicePolicy, *ticks: Observation) -> list[BudgetPlan]:
    state, plans = BudgetState({NAME: ClassBudgetState("b625", 0.0)}), []
    for seen in ticks:
        plan, state = budget.decide(seen, demand_of(policy, 4, seen.now_s), policy, state)
        plans.append(plan)
    return plans


def _counts(policy: ServicePolicy, *ticks: Observation) -> list[ReplicaPlan]:
    """Plans of ticks that each find three replicas ordered."""
    state, plans = ReplicaState(since_s=0.0), []
    for seen in ticks:
        plan, state = replicas.decide(seen, demand_of(policy, 1, seen.now_s), policy, state)
        plans.append(plan)
    return plans


def _scaling(**loss: Any) -> ServicePolicy:
    return service_policy(scaling={"minReplicas": 1, "maxReplicas": 12, "onSignalLoss": loss})


@pytest.mark.parametrize(
    ("rule", "points"),
    [
        ("Hold", ["b625", "b625", "b625"]),
        ("HoldThenSafePoint", ["b625", "b625", "b875"]),
        ("SafePoint", ["b875", "b875", "b875"]),
    ],
)
def test_points_go_to_the_safe_point_when_the_spec_says(rule: str, points: list[str]) -> None:
    """The envelope lasts 30 s."""
    policy = service_policy(budget={"onSignalLoss": rule, "safePoint": "b875"})
    plans = _budgets(policy, _at(0), _at(29), _at(31))
    assert [plan.by_name(NAME).point for plan in plans] == points
    for plan in plans:
        assert (plan.status, plan.reason) == (Status.BLOCKED, Reason.SIGNALS_STALE)
        assert plan.by_name(NAME).floor == "b500", "governors keep their range"
        assert "only 1 of 3 ready pods" in plan.message


def test_safe_point_below_a_floor_is_raised_to_it() -> None:
    classes = [service_class(quality={"minRelativeQuality": "0.97"})]
    policy = service_policy(classes=classes, budget={"onSignalLoss": "SafePoint", "safePoint": "b500"})
    assert _budgets(policy, _at(0))[0].by_name(NAME).point == "b750"


def test_reports_that_come_back_end_the_loss() -> None:
    policy = service_policy(budget={"onSignalLoss": "HoldThenSafePoint", "safePoint": "b875"})
    plans = _budgets(policy, _at(0), _at(20, HEARD), _at(25), _at(40))
    assert plans[1].reason is not Reason.SIGNALS_STALE
    assert plans[3].by_name(NAME).point == plans[1].by_name(NAME).point, "15 s of the second loss are no envelope"


@pytest.mark.parametrize(
    ("behavior", "count", "ordered"),
    [
        ("Static", 5, 5),
        ("Static", 2, 2),
        ("CurrentIfHigher", 5, 5),
        ("CurrentIfHigher", 2, 3),
        ("CurrentIfLower", 5, 3),
        ("CurrentIfLower", 2, 2),
    ],
)
def test_count_is_kept_for_a_while_and_then_what_the_spec_says(behavior: str, count: int, ordered: int) -> None:
    before, after = _counts(_scaling(behavior=behavior, replicas=count), _at(0), _at(60))
    assert (before.status, before.reason, before.replicas) == (Status.HOLD, Reason.SIGNALS_STALE, 3)
    assert (after.reason, after.replicas) == (Reason.SIGNALS_STALE, ordered)
    assert after.status is (Status.HOLD if ordered == 3 else Status.PROGRESS)
    assert (f"scaling.onSignalLoss is {behavior}" in after.message) is (ordered != 3)


def test_count_is_kept_for_ever_by_default() -> None:
    assert [plan.replicas for plan in _counts(service_policy(), _at(0), _at(3600))] == [3, 3]


def test_count_for_lost_signals_respects_steps_and_bounds() -> None:
    assert _counts(_scaling(behavior="Static", replicas=12), _at(0), _at(60))[1].replicas == 7, "four at a time"
    bounded = service_policy(
        scaling={"minReplicas": 1, "maxReplicas": 4, "onSignalLoss": {"behavior": "Static", "replicas": 12}}
    )
    assert _counts(bounded, _at(0), _at(60))[1].replicas == 4


def test_reports_that_come_back_begin_the_wait_anew() -> None:
    policy = _scaling(behavior="Static", replicas=5)
    plans = _counts(policy, _at(0), _at(30, HEARD), _at(60), _at(90))
    assert [plan.replicas for plan in plans] == [3, 3, 3, 3]


def test_pods_that_are_not_ready_are_no_lost_signals() -> None:
    starting = tuple(replace(one, ready=False) for one in SILENT)
    plans = _counts(_scaling(behavior="Static", replicas=5), _at(0, starting), _at(60, starting))
    assert [plan.replicas for plan in plans] == [3, 3]
