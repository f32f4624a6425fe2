"""Floors that hold for now: of a class that has spent its error budget of quality, and of a cost cap that sheds.

The error budget is a leaky bucket of D = `maxDegradedSecondsPerDay` seconds. It loses a second in each second in which
the class runs below its top, weighted by the share of pods that do, and gains D a day. Empty, it lifts the class's
floor to the top until a twentieth is back: more than an hour later, so that the floor itself cannot flap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prism_api.service import BudgetControl, OnCap
from prism_operator.plan.schedule import DAY_S
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    ClassPolicy,
    Observation,
    Reason,
    ServicePolicy,
)

RESTORED_SHARE = 1 / 20


@dataclass(frozen=True, slots=True)
class Lift:
    """Why a class may not run below its top."""

    reason: Reason
    message: str


def drain(observation: Observation, policy: ServicePolicy, state: BudgetState) -> BudgetState:
    """The state with every class's error budget brought to this moment. The first tick has no duration."""
    now_s = observation.now_s
    elapsed_s = 0.0 if state.last_s is None else max(0.0, now_s - state.last_s)
    classes = dict(state.classes)
    for class_policy in policy.classes:
        remembered, limit_s = classes.get(class_policy.name), class_policy.degraded_s_per_day
        if remembered is None:
            continue
        if limit_s is None:
            if remembered.degraded_left_s is not None or remembered.spent:
                classes[class_policy.name] = replace(remembered, degraded_left_s=None, spent=False)
            continue
        left_s = float(limit_s) if remembered.degraded_left_s is None else remembered.degraded_left_s
        share = _degraded_share(observation, policy, class_policy, remembered)
        left_s = min(float(limit_s), max(0.0, left_s + elapsed_s * (limit_s / DAY_S - share)))
        spent = left_s <= 0.0 or (remembered.spent and left_s < RESTORED_SHARE * limit_s)
        classes[class_policy.name] = replace(remembered, degraded_left_s=left_s, spent=spent)
    return replace(state, classes=classes, last_s=now_s)


def lifted(
    observation: Observation, policy: ServicePolicy, state: BudgetState
) -> tuple[ServicePolicy, Mapping[str, Lift]]:
    """The policy with the floors that hold for now, and why those that were lifted were."""
    if policy.budget is not BudgetControl.AUTO or policy.paused or policy.advisory:
        return policy, {}
    capped = _capped(observation, policy)
    lifts: dict[str, Lift] = {}
    for class_policy in policy.classes:
        remembered = state.classes.get(class_policy.name)
        if class_policy.floor == policy.max_point:
            continue
        if remembered is not None and remembered.spent:
            back_s = RESTORED_SHARE * (class_policy.degraded_s_per_day or 0)
            left_s = remembered.degraded_left_s or 0.0
            text = f"quality's error budget is spent: {left_s:.0f} s left, not below '{policy.max_point}' before"
            lifts[class_policy.name] = Lift(Reason.QUALITY_BUDGET_SPENT, f"{text} {back_s:.0f} s are back")
        elif capped:
            text = f"the cost cap pays for {policy.cap_replicas} replicas and onCap is Shed: quality is kept"
            lifts[class_policy.name] = Lift(Reason.COST_CAP, text)
    if not lifts:
        return policy, lifts
    classes = tuple(replace(one, floor=policy.max_point) if one.name in lifts else one for one in policy.classes)
    return replace(policy, classes=classes), lifts


def _capped(observation: Observation, policy: ServicePolicy) -> bool:
    """Every replica that the cap pays for is there: a shortage is the cap's, not a bridge's."""
    cap = policy.cap_replicas
    return policy.on_cap is OnCap.SHED and cap is not None and len(observation.ready) >= cap


def _degraded_share(
    observation: Observation, policy: ServicePolicy, class_policy: ClassPolicy, remembered: ClassBudgetState
) -> float:
    """Share of the ready pods that run the class below its top; a pod that does not say follows the plan."""
    ladder = policy.ladder
    held = [pod.points.get(class_policy.name, remembered.point) for pod in observation.ready]
    lower = sum(point in ladder and ladder.index(point) < ladder.index(policy.max_point) for point in held)
    return lower / len(held) if held else 0.0
