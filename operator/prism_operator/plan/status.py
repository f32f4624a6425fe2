"""What was seen and decided, as the resource's status: quantised, so that noise writes nothing.

Conditions live in `plan.conditions`. Times enter as RFC 3339 strings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import floor, log10
from typing import Any

from prism_api.conditions import Condition
from prism_api.control import Directive
from prism_api.model import PrismModelSpec, PrismModelStatus
from prism_api.service_status import (
    BudgetStatus,
    ClassStatus,
    CostStatus,
    Decision,
    PrismServiceStatus,
    Recommendation,
    RecommendedPoint,
)
from prism_operator.plan import demand
from prism_operator.plan.children import selector
from prism_operator.plan.conditions import Fact, View, model_facts, service_facts
from prism_operator.plan.types import (
    BudgetPlan,
    ClassPolicy,
    DemandState,
    Observation,
    ReplicaPlan,
    ServicePolicy,
    Unusable,
)

DECISIONS_KEPT = 5
_RATIO_STEP = Decimal("0.001")
_MONEY_STEP = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a status is made of. What is None is not known or not decided yet."""

    service_name: str
    generation: int
    now: str
    """RFC 3339; the transition time of conditions that flip now."""
    policy: ServicePolicy | Unusable
    observation: Observation | None = None
    demand: DemandState = field(default_factory=DemandState)
    budget_plan: BudgetPlan | None = None
    replica_plan: ReplicaPlan | None = None
    directive: Directive | None = None
    """In force: the last one sent."""
    desired_replicas: int | None = None
    refusing_pods: int = 0
    """Pods that refused the directive in force."""
    last_switch: str | None = None
    decisions: tuple[Decision, ...] = ()
    """Newest first."""
    problems: Mapping[str, Unusable] = field(default_factory=dict)
    """Failed conditions found outside the plan, by condition type; they win."""
    previous: Mapping[str, Any] = field(default_factory=dict)
    """The status as last read or written, wire names."""


def render(inputs: Inputs) -> dict[str, Any]:
    """The whole status of a PrismService, wire names. Equal inputs give equal output."""
    observation, policy = inputs.observation, inputs.policy
    usable = policy if isinstance(policy, ServicePolicy) else None
    view = View(
        policy=policy,
        observation=observation,
        demand=inputs.demand,
        budget_plan=inputs.budget_plan,
        replica_plan=inputs.replica_plan,
        desired_replicas=inputs.desired_replicas,
        acknowledged=_acknowledged(inputs),
        refusing=inputs.refusing_pods,
        problems=inputs.problems,
    )
    status = PrismServiceStatus(
        observed_generation=inputs.generation,
        replicas=None if observation is None else _existing(observation),
        ready_replicas=None if observation is None else len(observation.ready),
        starting_replicas=None if observation is None else len(observation.starting),
        desired_replicas=inputs.desired_replicas,
        selector=",".join(f"{key}={value}" for key, value in selector(inputs.service_name).items()),
        budget=_budget(inputs, usable),
        classes=_classes(inputs, usable),
        cost=_cost(usable, observation),
        recommendation=_recommendation(inputs, usable),
        decisions=list(inputs.decisions[:DECISIONS_KEPT]) or None,
        conditions=_conditions(service_facts(view), inputs.generation, inputs.now, inputs.previous),
    )
    return status.to_wire()


def render_model_status(
    *,
    generation: int,
    spec: PrismModelSpec | None,
    problem: str | None,
    services_using: int,
    now: str,
    previous: Mapping[str, Any],
) -> dict[str, Any]:
    """Status of a PrismModel. `problem` says why its spec cannot be read; then `spec` is None."""
    status = PrismModelStatus(
        observed_generation=generation,
        services_using=services_using,
        conditions=_conditions(model_facts(spec, problem), generation, now, previous),
    )
    return status.to_wire()


def _conditions(facts: list[Fact], generation: int, now: str, previous: Mapping[str, Any]) -> list[Condition]:
    """Facts as conditions; the transition time moves only when a status flips."""
    before = {str(one.get("type")): one for one in previous.get("conditions") or []}
    conditions = []
    for fact in facts:
        last = before.get(fact.type)
        kept = last is not None and last.get("status") == fact.status and last.get("lastTransitionTime")
        conditions.append(
            Condition(
                type=fact.type,
                status=fact.status,
                reason=fact.reason,
                message=fact.message[:1024],
                last_transition_time=str(kept or now),
                observed_generation=generation,
            )
        )
    return conditions


def _existing(observation: Observation) -> int:
    return sum(not pod.deleting for pod in observation.pods)


def _acknowledged(inputs: Inputs) -> int:
    if inputs.directive is None or inputs.observation is None:
        return 0
    return sum(pod.held == inputs.directive.fence for pod in inputs.observation.fresh)


def _budget(inputs: Inputs, policy: ServicePolicy | None) -> BudgetStatus | None:
    if inputs.directive is None or inputs.observation is None or policy is None:
        return None
    return BudgetStatus(
        epoch=inputs.directive.epoch,
        sequence=inputs.directive.sequence,
        acked_replicas=_acknowledged(inputs),
        stale_replicas=len(inputs.observation.ready) - len(inputs.observation.fresh),
        mean_budget_permille=_mean_budget(inputs.observation, policy, inputs.directive),
        last_switch_time=inputs.last_switch,
    )


def _mean_budget(observation: Observation, policy: ServicePolicy, directive: Directive) -> int:
    """Over ready pods and classes: the effective point where known, else the one last sent."""
    sent = {target.name: target.point for target in directive.classes}
    points = [pod.points.get(name, point) for pod in observation.ready for name, point in sent.items()]
    known = [policy.ladder[point].budget_permille for point in points or sent.values() if point in policy.ladder]
    return round(sum(known) / len(known)) if known else 0


def _classes(inputs: Inputs, policy: ServicePolicy | None) -> list[ClassStatus] | None:
    if policy is None or inputs.budget_plan is None or not inputs.budget_plan.classes:
        return None
    return [
        _class(inputs, policy, policy.by_name(target.name), target.point, target.degraded_left_s)
        for target in inputs.budget_plan.classes
    ]


def _class(
    inputs: Inputs, policy: ServicePolicy, class_policy: ClassPolicy, point: str, left_s: float | None
) -> ClassStatus:
    seen = demand.window(inputs.demand, class_policy.name, class_policy.window_s)
    target = class_policy.attainment_target
    ready = inputs.observation.ready if inputs.observation is not None else ()
    return ClassStatus(
        name=class_policy.name,
        point=point,
        effective_pods=sum(pod.points.get(class_policy.name) == point for pod in ready),
        attainment=_ratio(demand.attainment(seen)),
        ttft_milliseconds=_latency_ms(demand.latency_quantile_s(seen.ttft, target)),
        tpot_milliseconds=_latency_ms(demand.latency_quantile_s(seen.tpot, target)),
        relative_quality=_ratio(_mean_quality(seen.tokens_by_point, policy)),
        degraded_seconds_left=_whole_minutes(left_s),
    )


def _whole_minutes(seconds: float | None) -> int | None:
    """Rounded down, for a status that changes by the second would be written by the second."""
    return None if seconds is None else int(seconds // 60 * 60)


def _mean_quality(tokens_by_point: Mapping[str, int], policy: ServicePolicy) -> float | None:
    known = {point: tokens for point, tokens in tokens_by_point.items() if point in policy.ladder and tokens}
    if not known:
        return None
    quality = sum(tokens * float(policy.ladder[point].relative_quality) for point, tokens in known.items())
    return quality / sum(known.values())


def _cost(policy: ServicePolicy | None, observation: Observation | None) -> CostStatus | None:
    if policy is None or policy.price_per_hour is None or observation is None:
        return None
    per_hour = policy.price_per_hour * _existing(observation)
    return CostStatus(
        per_hour=per_hour.quantize(_MONEY_STEP),
        cap_utilization=(per_hour / policy.max_per_hour).quantize(_RATIO_STEP) if policy.max_per_hour else None,
    )


def _recommendation(inputs: Inputs, policy: ServicePolicy | None) -> Recommendation | None:
    """What the plan wants; the reason is the budget's while some class runs below its top, else the replicas'."""
    budget_plan, replica_plan = inputs.budget_plan, inputs.replica_plan
    if budget_plan is None or replica_plan is None or policy is None:
        return None
    lowered = any(target.point != policy.max_point for target in budget_plan.classes)
    return Recommendation(
        replicas=replica_plan.recommended,
        points=[
            RecommendedPoint(class_name=target.name, point=budget_plan.advised.get(target.name, target.point))
            for target in budget_plan.classes
        ],
        reason=(budget_plan if lowered else replica_plan).reason.value,
    )


def _ratio(value: float | None) -> Decimal | None:
    return None if value is None else Decimal(repr(value)).quantize(_RATIO_STEP)


def _latency_ms(seconds: float | None) -> int | None:
    """Milliseconds with two significant digits."""
    if seconds is None:
        return None
    milliseconds = max(1.0, seconds * 1000)
    return int(round(milliseconds, 1 - floor(log10(milliseconds))))
