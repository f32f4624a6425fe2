"""Status: all conditions on the first visit, quantised, and stable under noise."""

from dataclasses import replace
from typing import Any

import pytest

from prism_api.control import ServiceReference
from prism_api.service_status import Decision, PrismServiceStatus
from prism_operator.plan import budget, demand, directive
from prism_operator.plan.conditions import TYPES
from prism_operator.plan.status import Inputs, render, render_model_status
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    ClassDelta,
    DemandState,
    Observation,
    Reason,
    ReplicaPlan,
    ServicePolicy,
    Status,
    Unusable,
)
from tests.unit.plan.factories import (
    delta,
    demand_of,
    histogram,
    model_spec,
    observation,
    pod,
    service_policy,
    starting_pod,
)

NAME, NOW_S = "interactive", 60.0
NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"


def _inputs(
    point: str = "full",
    policy: ServicePolicy | None = None,
    seen: Observation | None = None,
    per_s: int = 3,
    **changes: Any,
) -> Inputs:
    policy = policy or service_policy()
    seen = seen or observation(NOW_S, (pod(point=point),))
    history = demand_of(policy, per_s, NOW_S)
    state = BudgetState({one.name: ClassBudgetState(point, -1000.0) for one in policy.classes})
    plan, _ = budget.decide(seen, history, policy, state)
    service = ServiceReference(namespace="demo", name="chat", uid="u")
    sent = directive.build(plan, policy, service=service, holder="h", epoch=1, sequence=1)
    fields: dict[str, Any] = {
        "service_name": "chat",
        "generation": 7,
        "now": NOW,
        "policy": policy,
        "observation": seen,
        "demand": history,
        "budget_plan": plan,
        "replica_plan": ReplicaPlan(Status.HOLD, Reason.STEADY, "holds", 1, 1),
        "directive": sent,
        "desired_replicas": 1,
    }
    return Inputs(**(fields | changes))


def _conditions(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["type"]: one for one in status["conditions"]}


def _judged(inputs: Inputs) -> dict[str, tuple[str, str]]:
    return {kind: (one["status"], one["reason"]) for kind, one in _conditions(render(inputs)).items()}


def test_healthy_service_is_ready_on_all_counts() -> None:
    judged = _judged(_inputs())
    assert judged == {
        "Ready": ("True", "AllReplicasServing"),
        "Accepted": ("True", "Valid"),
        "ModelResolved": ("True", "Resolved"),
        "SignalsAvailable": ("True", "Fresh"),
        "ObjectivesMet": ("True", "Met"),
        "BudgetConverged": ("True", "Acked"),
        "ScalingActive": ("True", "Managed"),
        "ScalingLimited": ("False", "WithinBounds"),
        "CapacityAvailable": ("True", "Fits"),
        "CostWithinCap": ("True", "NoCap"),
        "QualityDegraded": ("False", "FullQuality"),
        "Progressing": ("False", "Complete"),
    }


@pytest.mark.parametrize(
    "policy", [Unusable("ModelResolved", "NotFound", "no model"), Unusable("Accepted", "PriceUnknown", "no price")]
)
def test_first_visit_states_every_condition_even_of_a_refused_spec(policy: Unusable) -> None:
    status = render(Inputs(service_name="chat", generation=1, now=NOW, policy=policy))
    conditions = _conditions(status)
    assert tuple(conditions) == TYPES
    assert (conditions["Ready"]["status"], conditions["Ready"]["reason"]) == ("False", "NotAccepted")
    assert conditions[policy.condition]["message"] == policy.message
    assert conditions["ObjectivesMet"]["status"] == "Unknown"


def test_first_visit_of_an_accepted_spec_waits_for_replicas() -> None:
    status = render(Inputs(service_name="chat", generation=1, now=NOW, policy=service_policy()))
    assert _conditions(status)["Ready"]["reason"] == "WaitingForReplicas"


def test_status_is_what_the_crd_describes() -> None:
    status = render(_inputs())
    assert PrismServiceStatus.model_validate(status).to_wire() == status
    assert status["observedGeneration"] == 7
    assert status["selector"] == "moeprism.io/service=chat"
    assert status["cost"] == {"perHour": "2.50"}
    assert status["budget"] == {
        "epoch": 1,
        "sequence": 1,
        "ackedReplicas": 1,
        "staleReplicas": 0,
        "meanBudgetPermille": 1000,
    }


def test_transition_time_is_kept_until_the_status_flips() -> None:
    first = render(_inputs())
    second = render(replace(_inputs(), now=LATER, previous=first))
    assert second == first
    degraded = render(replace(_inputs("b750", per_s=7), now=LATER, previous=first))
    conditions = _conditions(degraded)
    assert conditions["QualityDegraded"]["lastTransitionTime"] == LATER
    assert conditions["Ready"]["lastTransitionTime"] == NOW


def test_values_are_quantised() -> None:
    policy = service_policy()
    seen = replace(delta(3), met=2, missed=1, ttft=histogram(813.0, 3), tokens_by_point={"full": 2, "b500": 1})
    state = DemandState(0.0, 0.0)
    state = demand.update(state, observation(1.0, classes={NAME: seen}), policy)
    wire = render(_inputs(demand=state))["classes"][0]
    assert wire["attainment"] == "0.667"
    assert wire["relativeQuality"] == "0.967"
    assert wire["ttftMilliseconds"] % 10 == 0


def test_noise_in_figures_changes_no_condition() -> None:
    quiet, noisy = _inputs(per_s=3), _inputs(per_s=4)
    assert render(quiet)["conditions"] == render(noisy)["conditions"]


def test_missed_objective_names_the_class() -> None:
    policy = service_policy()
    state = demand.update(
        DemandState(0.0, 0.0), observation(1.0, classes={NAME: ClassDelta(arrived=9, met=5, missed=4)}), policy
    )
    condition = _conditions(render(_inputs(demand=state)))["ObjectivesMet"]
    assert (condition["status"], condition["reason"]) == ("False", "Missed")
    assert "'interactive'" in condition["message"]


def test_service_without_traffic_has_unknown_objectives() -> None:
    assert _judged(_inputs(per_s=0))["ObjectivesMet"] == ("Unknown", "NoTraffic")


def test_lower_point_while_replicas_start_is_a_bridge() -> None:
    seen = observation(NOW_S, (pod(point="b500"), starting_pod("pod-1", NOW_S - 5)))
    judged = _judged(_inputs("b500", seen=seen, per_s=8))
    assert judged["QualityDegraded"] == ("True", "BurstBridge")
    assert judged["Progressing"] == ("True", "ScalingUp")


def test_pod_that_holds_an_older_directive_lags() -> None:
    seen = observation(NOW_S, (pod("a"), pod("b", held=None)))
    assert _judged(_inputs(seen=seen))["BudgetConverged"] == ("False", "Lagging")


def test_refusing_pod_is_a_rejection() -> None:
    assert _judged(_inputs(refusing_pods=1))["BudgetConverged"] == ("False", "Rejected")


def test_silent_pod_is_partial_and_most_silent_is_stale() -> None:
    one = observation(NOW_S, (pod("a"), pod("b", stale=True)))
    most = observation(NOW_S, (pod("a"), pod("b", stale=True), pod("c", stale=True)))
    assert _judged(_inputs(seen=one))["SignalsAvailable"] == ("True", "Partial")
    assert _judged(_inputs(seen=most))["SignalsAvailable"] == ("False", "Stale")


def test_overload_at_the_floors_is_no_capacity() -> None:
    assert _judged(_inputs("b500", per_s=20))["CapacityAvailable"] == ("False", "AtFloorAndMax")


def test_pod_without_a_node_is_no_capacity() -> None:
    seen = observation(NOW_S, (pod(), starting_pod("pod-1", NOW_S, unschedulable=True)))
    assert _judged(_inputs(seen=seen))["CapacityAvailable"] == ("False", "PodsUnschedulable")


def test_replicas_beyond_the_cap_exceed_it() -> None:
    policy = service_policy(replicas=4, scaling={"control": "External"}, cost={"maxPerHour": "5"})
    inputs = _inputs(policy=policy, seen=observation(NOW_S, 4), desired_replicas=4)
    assert _judged(inputs)["CostWithinCap"] == ("False", "Exceeded")
    assert render(inputs)["cost"] == {"perHour": "10.00", "capUtilization": "2.000"}


def test_limit_that_cuts_the_recommendation_is_named_with_its_cure() -> None:
    plan = ReplicaPlan(Status.BLOCKED, Reason.MAX_REPLICAS, "x", 3, 5, Reason.MAX_REPLICAS)
    condition = _conditions(render(_inputs(replica_plan=plan)))["ScalingLimited"]
    assert (condition["status"], condition["reason"]) == ("True", "MaxReplicas")
    assert "`scaling.maxReplicas`" in condition["message"]


def test_stuck_pods_are_named() -> None:
    plan = ReplicaPlan(Status.BLOCKED, Reason.IN_FLIGHT, "x", 2, 2, None, ("pod-9",))
    condition = _conditions(render(_inputs(replica_plan=plan)))["Progressing"]
    assert condition["reason"] == "Stuck"
    assert "pod-9" in condition["message"]


def test_problem_found_while_reconciling_wins() -> None:
    problem = Unusable("ScalingActive", "ConflictingOwner", "an HPA owns it")
    assert _judged(_inputs(problems={"ScalingActive": problem}))["ScalingActive"] == ("False", "ConflictingOwner")


def test_decisions_are_at_most_five_newest_first() -> None:
    decisions = tuple(
        Decision(time=NOW, kind="Replicas", from_=str(i), to=str(i + 1), reason="Demand", message="m") for i in range(9)
    )
    assert [one["from"] for one in render(_inputs(decisions=decisions))["decisions"]] == ["0", "1", "2", "3", "4"]


def test_recommendation_tells_the_budgets_reason_while_it_is_low() -> None:
    assert render(_inputs())["recommendation"]["reason"] == "Steady"
    assert render(_inputs("b750", per_s=7))["recommendation"]["reason"] == "Brownout"


def test_model_status_says_whether_its_points_can_be_used() -> None:
    good = render_model_status(generation=1, spec=model_spec(), problem=None, services_using=2, now=NOW, previous={})
    assert good["servicesUsing"] == 2
    assert {one["status"] for one in good["conditions"]} == {"True"}
    points = model_spec().to_wire()["operatingPoints"]
    points[0]["relativeQualityLow"] = "0.999"
    bad = render_model_status(
        generation=2, spec=model_spec(operatingPoints=points), problem=None, services_using=0, now=LATER, previous=good
    )
    assert {one["reason"] for one in bad["conditions"]} == {"NotMonotone"}
    assert {one["lastTransitionTime"] for one in bad["conditions"]} == {LATER}
