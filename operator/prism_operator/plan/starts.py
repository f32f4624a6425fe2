"""How long pods take to become ready, and which of them take too long."""

from prism_operator.plan.types import Observation, PodView, ServicePolicy

EWMA_WEIGHT = 0.3
"""Weight of the newest pod-ready time in the expectation."""
REMEMBERED_STARTS = 10


def expected_ready_s(observation: Observation, policy: ServicePolicy) -> float:
    """Creation-to-Ready time to expect of a new pod: moving average of the measured ones."""
    times = observation.pod_ready_times_s
    if not times:
        return policy.loop.pod_ready_s
    expected = times[0]
    for measured in times[1:]:
        expected += EWMA_WEIGHT * (measured - expected)
    return expected


def patience_s(observation: Observation, policy: ServicePolicy) -> float:
    """After this long a start is stuck: `stuck_factor` times the longest of the last starts."""
    slowest = max(observation.pod_ready_times_s[-REMEMBERED_STARTS:], default=policy.loop.pod_ready_s)
    return policy.loop.stuck_factor * slowest


def stuck_pods(observation: Observation, policy: ServicePolicy) -> tuple[PodView, ...]:
    """Pods that start for longer than that."""
    limit_s = patience_s(observation, policy)
    return tuple(
        pod
        for pod in observation.starting
        if observation.now_s - max(pod.created_s, pod.ready_s or pod.created_s) > limit_s
    )
