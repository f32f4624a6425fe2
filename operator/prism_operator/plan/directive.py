"""A budget plan as the message that pods get."""

from prism_api.control import ClassDirective, Directive, Envelope, GovernorSettings, ServiceReference
from prism_operator.plan.types import BudgetPlan, ServicePolicy


def build(
    plan: BudgetPlan,
    policy: ServicePolicy,
    *,
    service: ServiceReference,
    holder: str,
    epoch: int,
    sequence: int,
) -> Directive | None:
    """The whole state that `plan` asks for, fenced by (epoch, sequence); None if the plan asks for nothing yet.

    Pods' governors get the dwells of the operator's own fast loop.
    """
    if not plan.classes:
        return None
    classes = []
    for target in plan.classes:
        class_policy = policy.by_name(target.name)
        classes.append(
            ClassDirective(
                name=target.name,
                priority=class_policy.priority,
                ttft_ms=_milliseconds(class_policy.ttft_s),
                tpot_ms=_milliseconds(class_policy.tpot_s),
                point=target.point,
                floor=target.floor,
                ceiling=target.ceiling,
                admission=target.admission,
            )
        )
    return Directive(
        service=service,
        model_digest=policy.model_digest,
        holder=holder,
        epoch=epoch,
        sequence=sequence,
        default_class=policy.default_class,
        classes=classes,
        envelope=Envelope(ttl_ms=policy.effective.envelope_ttl_s * 1000, safe_point=policy.safe_point),
        governor=GovernorSettings(
            high=round(policy.loop.governor_high * 1000),
            low=round(policy.loop.low * 1000),
            dwell_down_ms=policy.effective.dwell_down_ms,
            dwell_up_ms=policy.effective.dwell_up_ms,
        ),
        reason=plan.reason.value,
    )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
