"""Conditions of PrismService and PrismModel: each a fact with a reason and a sentence.

All of them are stated on the first visit; what is not known yet is Unknown. Messages hold no figures that change from
second to second, for a status is written when it differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from prism_api import FULL
from prism_api.model import PrismModelSpec
from prism_api.scaling import ScalingControl
from prism_operator.plan import demand
from prism_operator.plan.types import (
    BudgetPlan,
    ClassPolicy,
    DemandState,
    Observation,
    Reason,
    ReplicaPlan,
    ServicePolicy,
    Unusable,
)

Truth = Literal["True", "False", "Unknown"]

TYPES = (
    "Ready",
    "Accepted",
    "ModelResolved",
    "SignalsAvailable",
    "ObjectivesMet",
    "BudgetConverged",
    "ScalingActive",
    "ScalingLimited",
    "CapacityAvailable",
    "CostWithinCap",
    "QualityDegraded",
    "Progressing",
)
_DEGRADED = {
    Reason.BURST_BRIDGE: "BurstBridge",
    Reason.ROLLOUT: "Rollout",
    Reason.POD_LOST: "PodLost",
    Reason.PINNED: "Pinned",
    Reason.COST_CAP: "CostCap",
    Reason.REHEARSAL: "Rehearsal",
}
"""Reasons of a plan that name the cause of a lower point; any other is a brownout."""


@dataclass(frozen=True, slots=True)
class Fact:
    type: str
    status: Truth
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class View:
    """What conditions are judged by."""

    policy: ServicePolicy | Unusable
    observation: Observation | None
    demand: DemandState
    budget_plan: BudgetPlan | None
    replica_plan: ReplicaPlan | None
    desired_replicas: int | None
    acknowledged: int
    refusing: int
    problems: Mapping[str, Unusable]


def service_facts(view: View) -> list[Fact]:
    """One fact per condition type, in the order of TYPES."""
    accepted, resolved = _acceptance(view.policy)
    facts = {fact.type: fact for fact in (accepted, resolved)}
    if isinstance(view.policy, ServicePolicy):
        for judge in (
            _signals,
            _objectives,
            _convergence,
            _scaling_active,
            _scaling_limited,
            _capacity,
            _cost,
            _quality,
            _progress,
        ):
            fact = judge(view, view.policy)
            facts[fact.type] = fact
    for kind, problem in view.problems.items():
        facts[kind] = Fact(kind, "False", problem.reason, problem.message)
    facts["Ready"] = _ready(view, facts)
    return [facts.get(kind) or Fact(kind, "Unknown", "NotAccepted", _waits(facts)) for kind in TYPES]


def model_facts(spec: PrismModelSpec | None, problem: str | None) -> list[Fact]:
    """Ready and ArtifactResolved. The artifact itself is judged by the pods that load it."""
    if spec is None:
        facts = [("False", "NotReady", problem or "The spec cannot be read.")]
    else:
        try:
            points = len(spec.ladder)
        except ValueError as error:
            facts = [("False", "NotMonotone", f"{error}.")]
        else:
            text = f"{points} operating points, from '{spec.ladder.points[0].name}' to '{FULL}'."
            facts = [("True", "Resolved", text)]
    truth, reason, text = facts[0]
    status: Truth = "True" if truth == "True" else "False"
    return [Fact(kind, status, reason, text) for kind in ("Ready", "ArtifactResolved")]


def _acceptance(policy: ServicePolicy | Unusable) -> tuple[Fact, Fact]:
    if isinstance(policy, ServicePolicy):
        return (
            Fact("Accepted", "True", "Valid", "The spec is consistent with its model and prices."),
            Fact("ModelResolved", "True", "Resolved", f"The model has {len(policy.ladder)} operating points."),
        )
    failed = Fact(policy.condition, "False", policy.reason, policy.message)
    if policy.condition == "ModelResolved":
        return Fact("Accepted", "Unknown", "ModelNotResolved", "The spec is checked once its model is known."), failed
    return failed, Fact("ModelResolved", "True", "Resolved", "The PrismModel was found.")


def _waits(facts: Mapping[str, Fact]) -> str:
    failed = next((fact for fact in facts.values() if fact.status == "False"), None)
    return f"Not judged before {failed.type} is True." if failed else "Not judged yet."


def _ready(view: View, facts: Mapping[str, Fact]) -> Fact:
    for kind in ("ModelResolved", "Accepted"):
        if facts[kind].status != "True":
            return Fact("Ready", "False", "NotAccepted", f"{kind}: {facts[kind].message}")
    assert isinstance(view.policy, ServicePolicy) or view.problems, "Accepted and resolved specs have a policy"
    ready = 0 if view.observation is None else len(view.observation.ready)
    wanted = _wanted(view)
    if wanted == 0:
        return Fact("Ready", "True", "ScaledToZero", "Sleeps at zero replicas until it is woken.")
    if ready >= wanted:
        return Fact("Ready", "True", "AllReplicasServing", f"At least {wanted} replicas serve.")
    text = (
        f"{ready} of at least {wanted} replicas are ready. Pods that stay pending or restart say why in their events."
    )
    return Fact("Ready", "False", "WaitingForReplicas", text)


def _wanted(view: View) -> int:
    """Replicas without which a service is not ready: the minimum, or what the owner of the count asks for.

    One that may sleep needs none while it does, and one while it does not.
    """
    if not isinstance(view.policy, ServicePolicy):
        return 1
    if view.policy.idle_after_s is not None and view.desired_replicas == 0:
        return 0
    return max(1, view.policy.spec_replicas or view.policy.min_replicas)


def _signals(view: View, policy: ServicePolicy) -> Fact:
    kind = "SignalsAvailable"
    ready = () if view.observation is None else view.observation.ready
    if view.observation is None or not ready:
        return Fact(kind, "False", "NoPods", "No pod is ready, so none reports load.")
    silent = sorted(pod.name for pod in ready if pod.stale)
    if not silent:
        return Fact(kind, "True", "Fresh", "Every ready pod reports.")
    named = ", ".join(silent[:5]) + (" and others" if len(silent) > 5 else "")
    if len(silent) * 2 > len(ready):
        text = f"Most ready pods are silent ({named}); points are held. Check the network policy and the control port."
        return Fact(kind, "False", "Stale", text)
    return Fact(kind, "True", "Partial", f"Silent pods: {named}; they count at '{FULL}'.")


def _objectives(view: View, policy: ServicePolicy) -> Fact:
    kind = "ObjectivesMet"
    missed, judged = [], False
    for class_policy in policy.classes:
        share = demand.attainment(demand.window(view.demand, class_policy.name, class_policy.window_s))
        judged = judged or share is not None
        if share is not None and share < class_policy.attainment_target:
            missed.append(class_policy)
    if missed:
        return Fact(kind, "False", "Missed", "; ".join(_missed(class_policy) for class_policy in missed) + ".")
    if not judged:
        return Fact(kind, "Unknown", "NoTraffic", "No request was judged in the window of any class.")
    return Fact(kind, "True", "Met", "Every class with traffic is at or above its attainmentTarget.")


def _missed(class_policy: ClassPolicy) -> str:
    return (
        f"class '{class_policy.name}' is below its attainmentTarget {class_policy.attainment_target:g} "
        f"over {class_policy.window_s} s"
    )


def _convergence(view: View, policy: ServicePolicy) -> Fact:
    kind = "BudgetConverged"
    ready = 0 if view.observation is None else len(view.observation.ready)
    if ready == 0:
        return Fact(kind, "Unknown", "NoPods", "No pod is ready.")
    if view.refusing:
        return Fact(kind, "False", "Rejected", "A pod refuses the directive; its Event DirectiveRejected says why.")
    if view.acknowledged < ready:
        return Fact(kind, "False", "Lagging", f"{ready - view.acknowledged} of {ready} ready pods hold an older one.")
    return Fact(kind, "True", "Acked", "Every ready pod holds the last directive.")


def _scaling_active(view: View, policy: ServicePolicy) -> Fact:
    if policy.paused:
        return Fact("ScalingActive", "False", "Paused", "mode is Paused; set it to Active to scale again.")
    if policy.advisory:
        text = "mode is Advisory: status.recommendation says what would be done; set it to Active to do it."
        return Fact("ScalingActive", "False", "Advisory", text)
    texts = {
        ScalingControl.MANAGED: "The operator decides the replica count.",
        ScalingControl.EXTERNAL: "The owner of /scale decides the replica count.",
        ScalingControl.FIXED: "The replica count is as written in the spec.",
    }
    return Fact("ScalingActive", "True", policy.scaling.value, texts[policy.scaling])


def _scaling_limited(view: View, policy: ServicePolicy) -> Fact:
    kind, plan = "ScalingLimited", view.replica_plan
    if plan is None:
        return Fact(kind, "Unknown", "NotPlanned", "No replica count was planned yet.")
    if plan.limited_by is None:
        return Fact(kind, "False", "WithinBounds", "No bound cuts the recommendation.")
    cures = {
        Reason.MAX_REPLICAS: "Demand asks for more than `scaling.maxReplicas`; raise it, or accept a lower budget.",
        Reason.COST_CAP: "Demand asks for more than `cost.maxPerHour` pays for; raise it, or accept a lower budget.",
        Reason.FLEET_QUOTA: "Demand asks for more than the fleet's arbitration grants; the budget makes up for it.",
        Reason.SCHEDULE: "Demand asks for more than the schedule in force allows; the budget makes up for it.",
        Reason.STEP_CAP: "One decision adds at most `scaling.maxStep` replicas; the rest follows.",
    }
    return Fact(kind, "True", plan.limited_by.value, cures[plan.limited_by])


def _capacity(view: View, policy: ServicePolicy) -> Fact:
    kind = "CapacityAvailable"
    plan, observation = view.budget_plan, view.observation
    if observation is not None and any(pod.unschedulable for pod in observation.pods):
        text = "No node fits some pods; add nodes or free the resource they ask for."
        return Fact(kind, "False", "PodsUnschedulable", text)
    if plan is None or plan.fits is None:
        return Fact(kind, "Unknown", "NotMeasured", "Load or profile is not known yet.")
    at_floors = all(target.point == policy.by_name(target.name).floor for target in plan.classes)
    if not plan.fits and at_floors:
        text = "Load exceeds the ready replicas with every class at its floor; requests queue or are shed."
        return Fact(kind, "False", "AtFloorAndMax", text)
    return Fact(kind, "True", "Fits", "Load fits within the range of the budget.")


def _cost(view: View, policy: ServicePolicy) -> Fact:
    kind, cap = "CostWithinCap", policy.max_per_hour
    if cap is None:
        return Fact(kind, "True", "NoCap", "No cost cap is set.")
    replicas = 0 if view.observation is None else sum(not pod.deleting for pod in view.observation.pods)
    if (policy.price_per_hour or Decimal(0)) * max(replicas, view.desired_replicas or 0) > cap:
        return Fact(kind, "False", "Exceeded", f"Replicas cost more than `cost.maxPerHour` {cap}.")
    return Fact(kind, "True", "Within", f"Replicas cost at most `cost.maxPerHour` {cap}.")


def _quality(view: View, policy: ServicePolicy) -> Fact:
    kind, plan = "QualityDegraded", view.budget_plan
    if plan is None or not plan.classes:
        return Fact(kind, "Unknown", "NotPlanned", "No operating point was planned yet.")
    lowered = [target for target in plan.classes if target.point != FULL]
    if not lowered:
        return Fact(kind, "False", "FullQuality", f"Every class runs at '{FULL}'.")
    reason = next((_DEGRADED[target.reason] for target in lowered if target.reason in _DEGRADED), "Brownout")
    named = ", ".join(f"'{target.name}' at '{target.point}'" for target in lowered)
    return Fact(kind, "True", reason, f"Below '{FULL}', within the floors: {named}.")


def _progress(view: View, policy: ServicePolicy) -> Fact:
    kind, observation = "Progressing", view.observation
    if observation is None:
        return Fact(kind, "Unknown", "NotPlanned", "Nothing was observed yet.")
    if view.replica_plan is not None and view.replica_plan.stuck_pods:
        named = ", ".join(view.replica_plan.stuck_pods[:5])
        text = f"Pods start for too long and are not counted on: {named}. Their events and logs say why."
        return Fact(kind, "True", "Stuck", text)
    if observation.rollout:
        return Fact(kind, "True", "RolloutInProgress", "Pods are replaced by a new template.")
    wanted = observation.ordered_replicas or 0
    if len(observation.ready) < wanted:
        return Fact(kind, "True", "ScalingUp", f"{wanted} replicas are ordered, not all are ready.")
    if any(pod.deleting for pod in observation.pods):
        return Fact(kind, "True", "ScalingDown", "Pods drain.")
    return Fact(kind, "False", "Complete", "All ordered replicas are ready.")
