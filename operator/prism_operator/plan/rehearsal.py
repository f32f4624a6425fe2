"""Rehearsal of a scale-down: one pod leaves traffic, warm and ready, before it is given up.

A test on figures can only compute whether N - 1 replicas hold the load; a rehearsal shows it. The pod loses its serving
label and finishes what it has. If objectives hold and no class had to sink below the points that were planned for, the
pod is removed, else it goes back into traffic within a second, without a start.
"""

from collections.abc import Mapping

from prism_operator.plan import demand
from prism_operator.plan.types import DemandState, Observation, PodView, Rehearsal, ServicePolicy


def why_not_now(observation: Observation, stuck: tuple[PodView, ...]) -> str | None:
    """Why no rehearsal may begin: the fleet must be whole, or its outcome would say nothing."""
    if observation.rollout:
        return "pods are being replaced by a new template"
    if len(observation.starting) > len(stuck):
        return "pods are starting"
    if len(observation.fresh) < len(observation.ready):
        return "not every ready pod reports"
    if len(observation.ready) < 2:
        return "no pod would be left in traffic"
    return None


def victim(observation: Observation) -> PodView:
    """The pod that loses least: the fewest requests, of equal ones the newest."""

    def outstanding(pod: PodView) -> int:
        return 0 if pod.load is None else pod.load.running + pod.load.waiting

    return min(observation.ready, key=lambda pod: (outstanding(pod), -pod.created_s, pod.uid))


def current(observation: Observation, rehearsal: Rehearsal | None) -> Rehearsal | None:
    """The rehearsal, unless its pod is going or gone, or the count has fallen by another pod than this one."""
    if rehearsal is None:
        return None
    pods = [pod for pod in observation.pods if not pod.deleting]
    if all(pod.uid != rehearsal.uid for pod in pods):
        return None
    fallen = observation.ordered_replicas is not None and len(pods) <= observation.ordered_replicas
    return None if rehearsal.passed and fallen else rehearsal


def failure(
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    rehearsal: Rehearsal,
    nominal: Mapping[str, str],
) -> str | None:
    """What went wrong since the pod left traffic; None while all is well."""
    if len(observation.fresh) < len(observation.ready):
        return "not every ready pod reports"
    seconds = observation.now_s - rehearsal.since_s
    for class_policy in policy.classes:
        name = class_policy.name
        seen = demand.window(state, name, min(seconds, policy.loop.long_window_s))
        share = demand.attainment(seen)
        if share is not None and share < class_policy.attainment_target:
            return f"attainment of '{name}' fell to {share:.3f}, below {class_policy.attainment_target:g}"
        for histogram, objective_s in ((seen.ttft, class_policy.ttft_s), (seen.tpot, class_policy.tpot_s)):
            latency_s = demand.latency_quantile_s(histogram, class_policy.attainment_target)
            if latency_s is not None and objective_s is not None and latency_s > policy.loop.high * objective_s:
                return f"saturation of '{name}' {latency_s / objective_s:.2f} > {policy.loop.high:.2f}"
        planned = nominal.get(name)
        held = {pod.points[name] for pod in observation.fresh if name in pod.points}
        lower = [point for point in held if point in policy.ladder and planned is not None]
        if planned is not None and any(policy.ladder.index(point) < policy.ladder.index(planned) for point in lower):
            return f"'{name}' had to sink below '{planned}'"
    return None
