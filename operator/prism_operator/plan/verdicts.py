"""Verdicts of the fast decision put into words and into one plan."""

from dataclasses import dataclass

from prism_api import FULL
from prism_api.control import Admission
from prism_operator.plan.pressure import Pressure
from prism_operator.plan.types import BudgetPlan, BudgetState, ClassTarget, Observation, Reason, ServicePolicy, Status

Points = dict[str, str]

_WEIGHT = (
    Reason.BURST_BRIDGE,
    Reason.POD_LOST,
    Reason.ROLLOUT,
    Reason.REHEARSAL,
    Reason.BROWNOUT,
    Reason.QUALITY_BUDGET_SPENT,
    Reason.COST_CAP,
    Reason.AT_FLOOR,
    Reason.RESTORE,
)
"""Which class's reason stands for the service's when they differ: what degrades comes first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided for one class, and why."""

    point: str
    status: Status
    reason: Reason
    message: str
    rejected: str = ""
    """The best alternative and why it was not taken."""


def assemble(
    observation: Observation,
    policy: ServicePolicy,
    state: BudgetState,
    verdicts: dict[str, Verdict],
    pressure: Pressure | None = None,
    pinned: bool = False,
) -> BudgetPlan:
    """Put verdicts into a plan. Governors may sink by themselves and come back as far as the plan's point; above it
    they would fight the operator. `pinned` leaves them no range.
    """
    targets = []
    for class_policy in policy.classes:
        name, verdict = class_policy.name, verdicts[class_policy.name]
        targets.append(
            ClassTarget(
                name=name,
                point=verdict.point,
                floor=verdict.point if pinned else class_policy.floor,
                ceiling=verdict.point,
                admission=Admission.SHED if state.classes[name].shedding else Admission.ACCEPT,
                status=verdict.status,
                reason=verdict.reason,
                message=f"{verdict.message}; rejected {verdict.rejected}" if verdict.rejected else verdict.message,
                saturation=pressure.saturation[name] if pressure is not None else None,
                degraded_left_s=state.classes[name].degraded_left_s,
                rejected=verdict.rejected,
            )
        )
    lead = min(targets, key=lambda t: (t.status is not Status.PROGRESS, _rank(t.reason)))
    points = {target.name: target.point for target in targets}
    return BudgetPlan(
        status=lead.status,
        reason=lead.reason,
        message=f"{lead.name}: {lead.message}",
        classes=tuple(targets),
        bridging=observation.missing > 0,
        fits=pressure.fits(points, policy.loop.rate_margin) if pressure is not None else None,
        inputs={} if pressure is None else _inputs(pressure, points),
    )


def _inputs(pressure: Pressure, points: Points) -> dict[str, float]:
    """What is unknown is left out."""
    known = {f"offered_per_s.{name}": rate for name, rate in pressure.rates.items() if rate is not None}
    known |= {f"saturation.{name}": value for name, value in pressure.saturation.items() if value is not None}
    known |= {"ready": float(pressure.ready), "ordered": float(pressure.ordered), "backlog": float(pressure.backlog)}
    need = pressure.need(points)
    return known if need is None else known | {"need": need}


def _rank(reason: Reason) -> int:
    return _WEIGHT.index(reason) if reason in _WEIGHT else len(_WEIGHT)


def resting(policy: ServicePolicy, point: str) -> Reason:
    """Reason of a class that has nothing to do at this point."""
    return Reason.AT_FULL if point == FULL else Reason.STEADY if point == policy.max_point else Reason.BROWNOUT


def offered(pressure: Pressure) -> str:
    """The load, for a message."""
    rate = sum(rate for rate in pressure.rates.values() if rate is not None)
    return f"{rate:.2f}/s" + (f" and {pressure.backlog} waiting" if pressure.backlog else "")


def listed(points: Points) -> str:
    """Points, for a message: one name if all are alike."""
    names = sorted(set(points.values()))
    return names[0] if len(names) == 1 else ", ".join(f"{name}={point}" for name, point in sorted(points.items()))


def calm(pressure: Pressure, name: str) -> str:
    """What a class that is not pressed looks like, for a message."""
    saturation = pressure.saturation[name]
    measured = "no latency samples" if saturation is None else f"saturation {saturation:.2f}"
    return f"{measured}, offered {offered(pressure)} on {pressure.ready} ready pods"
