"""Bounds of a replica count at one moment, and which of them cuts: schedule, minimum, maximum, cost cap, grant."""

from dataclasses import dataclass

from prism_operator.plan.schedule import Bounds
from prism_operator.plan.types import Reason


@dataclass(frozen=True, slots=True)
class Limits:
    """Least and most replicas, each with what sets it. `most` None: nothing bounds the count from above."""

    least: int
    most: int | None
    least_by: Reason
    most_by: Reason

    def clamp(self, replicas: int) -> tuple[int, Reason | None]:
        """The count inside the limits, and what cut it from above."""
        if self.most is not None and replicas > self.most:
            return self.most, self.most_by
        return max(replicas, self.least), None


def limits(bounds: Bounds, *, asleep: bool) -> Limits:
    """`asleep` lets a minimum of 0 be one; a service that is awake keeps a replica."""
    policy = bounds.policy
    most = policy.max_replicas
    most_by = Reason.SCHEDULE if bounds.most_by else Reason.MAX_REPLICAS
    for cap, reason in ((policy.cap_replicas, Reason.COST_CAP), (policy.granted_replicas, Reason.FLEET_QUOTA)):
        if cap is not None and (most is None or cap < most):
            most, most_by = cap, reason
    least = policy.min_replicas if asleep else max(1, policy.min_replicas)
    if most is not None:
        least = min(least, most)
    return Limits(least, most, Reason.SCHEDULE if bounds.least_by else Reason.DEMAND, most_by)
