"""Advisory mode: plan and publish, act on nothing."""

from prism_operator.plan import budget, replicas
from prism_operator.plan.types import BudgetState, ClassBudgetState, Reason, ReplicaState, Status
from tests.unit.plan.factories import demand_of, observation, pod, service_policy

NAME, NOW_S = "interactive", 60.0
ADVISORY = service_policy(mode="Advisory")
STATE = BudgetState({NAME: ClassBudgetState("b500", -1000.0)})


def test_every_class_runs_at_full_and_the_plan_says_where_it_would_run() -> None:
    plan, _ = budget.decide(observation(NOW_S), demand_of(ADVISORY, 8, NOW_S), ADVISORY, STATE)
    target = plan.by_name(NAME)
    assert (target.floor, target.point, target.ceiling) == ("full", "full", "full")
    assert (plan.status, plan.reason, plan.advised) == (Status.HOLD, Reason.ADVISORY, {NAME: "b500"})
    assert "would run at 'b500': offered 8.00/s exceeds 1 ready pods" in target.message


def test_calm_service_is_advised_to_stay_at_its_top() -> None:
    bounded = service_policy(mode="Advisory", budget={"max": "b875"})
    plan, _ = budget.decide(observation(NOW_S), demand_of(bounded, 2, NOW_S), bounded, STATE)
    assert (plan.by_name(NAME).point, plan.advised) == ("full", {NAME: "b875"})


def test_replicas_stay_as_they_are_and_are_recommended() -> None:
    history = demand_of(ADVISORY, 12, NOW_S)
    plan, _ = replicas.decide(observation(NOW_S), history, ADVISORY, ReplicaState(since_s=0.0))
    assert (plan.status, plan.reason, plan.replicas, plan.recommended) == (Status.HOLD, Reason.ADVISORY, 1, 3)


def test_active_service_goes_on_from_full_after_advice() -> None:
    _, state = budget.decide(observation(NOW_S), demand_of(ADVISORY, 8, NOW_S), ADVISORY, STATE)
    active = service_policy()
    plan, _ = budget.decide(observation(NOW_S + 1, (pod(),)), demand_of(active, 2, NOW_S), active, state)
    assert plan.by_name(NAME).point == "full"
