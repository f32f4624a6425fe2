"""What both loops do while too few pods report for anything to be decided.

Unknown is not zero: nobody scales down because nothing is heard. But unknown need not stay as it was for ever either:
pods that cannot be reached go to the safe point by themselves when their envelope expires, and whoever runs a service
may want those that can be reached to do the same, and a count of replicas that is known to be enough.

    budget.onSignalLoss     Hold renews the points that are held; HoldThenSafePoint does so for as long as an envelope
                            lasts, which is when the others move; SafePoint moves at once
    scaling.onSignalLoss    after `afterSeconds` the count: what is ordered, `replicas`, or the higher or the lower of
                            both (the choices of `fallback.behavior` in KEDA's ScaledObject)
"""

from collections.abc import Mapping

from prism_api.scaling import OnSignalLoss
from prism_api.service import BudgetOnSignalLoss
from prism_operator.plan.types import Observation, ServicePolicy

ENOUGH = 0.5
"""Share of the ready pods that must have reported freshly."""


def is_blind(observation: Observation) -> bool:
    """Without a ready pod there is nothing to be seen, which is another matter."""
    return len(observation.fresh) < ENOUGH * len(observation.ready)


def since_s(observation: Observation, before_s: float | None) -> float | None:
    """Since when, given what was remembered; None while enough pods report."""
    if not is_blind(observation):
        return None
    return observation.now_s if before_s is None else before_s


def said(observation: Observation) -> str:
    return f"only {len(observation.fresh)} of {len(observation.ready)} ready pods reported freshly"


def points(policy: ServicePolicy, held: Mapping[str, str], blind_s: float) -> tuple[dict[str, str], str]:
    """Where classes run after `blind_s` seconds without enough reports, and the words for it."""
    rule, ttl_s = policy.effective.budget_on_signal_loss, policy.effective.envelope_ttl_s
    waits = rule is BudgetOnSignalLoss.HOLD_THEN_SAFE_POINT and blind_s < ttl_s
    if rule is BudgetOnSignalLoss.HOLD or waits:
        then = f", for {ttl_s - blind_s:.0f} s more" if waits else ""
        return dict(held), f"points are held and envelopes renewed{then}"
    safe = {one.name: policy.ladder.clamp(policy.safe_point, one.floor, policy.max_point) for one in policy.classes}
    return safe, f"budget.onSignalLoss is {rule}: to the safe point '{policy.safe_point}'"


def replicas(policy: ServicePolicy, ordered: int, blind_s: float) -> int:
    """The count after `blind_s` seconds without enough reports, before any limit."""
    loss = policy.effective.scaling_on_signal_loss
    fallback = loss.replicas
    if fallback is None or blind_s < loss.after_seconds:
        return ordered
    return {
        OnSignalLoss.CURRENT: ordered,
        OnSignalLoss.STATIC: fallback,
        OnSignalLoss.CURRENT_IF_HIGHER: max(ordered, fallback),
        OnSignalLoss.CURRENT_IF_LOWER: min(ordered, fallback),
    }[loss.behavior]
