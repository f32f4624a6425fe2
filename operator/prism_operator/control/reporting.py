"""What a tick says about itself: moves of the budget, Events about pods, and the service's metrics."""

from prism_api import FULL
from prism_api.control import EnvelopeState
from prism_api.points import Ladder
from prism_operator import metrics
from prism_operator.control.events import Events, Regarding
from prism_operator.control.recorder import Move
from prism_operator.control.world import ServiceWorld
from prism_operator.plan import demand
from prism_operator.plan.types import BudgetPlan, Observation, Reason, ReplicaPlan, ServicePolicy


def budget_moves(last: BudgetPlan | None, plan: BudgetPlan, ladder: Ladder) -> list[Move]:
    """One move per class whose point changed; none for the first plan after a start, which repeats what pods hold."""
    if last is None:
        return []
    before = {target.name: target.point for target in last.classes}
    moves = []
    for target in plan.classes:
        was = before.get(target.name, target.point)
        if was == target.point:
            continue
        lowered = was not in ladder or ladder.index(target.point) < ladder.index(was)
        event = "BudgetLowered" if lowered else "BudgetRestored"
        moves.append(Move("Budget", target.name, was, target.point, target.reason, target.message, event))
    return moves


def post_bridge(events: Events, regarding: Regarding, last: BudgetPlan | None, plan: BudgetPlan) -> None:
    """Say when a bridge begins and ends: the time in which a lower budget stands in for replicas that start."""
    was, lowered = last is not None and last.bridging, any(t.point != FULL for t in plan.classes)
    if plan.bridging and not was and lowered:
        events.post(regarding, "BridgeStarted", "PlanBudget", plan.message)
    elif was and not plan.bridging:
        events.post(regarding, "BridgeEnded", "PlanBudget", "all ordered replicas are ready")


def post_spent_quality(events: Events, regarding: Regarding, last: BudgetPlan | None, plan: BudgetPlan) -> None:
    """Say when a class has spent its error budget of quality, once each time."""
    before = {target.name: target.reason for target in last.classes} if last is not None else {}
    for target in plan.classes:
        if target.reason is Reason.QUALITY_BUDGET_SPENT and before.get(target.name) is not target.reason:
            events.post(regarding, "QualityBudgetSpent", "PlanBudget", f"class '{target.name}': {target.message}")


def post_rehearsal(events: Events, regarding: Regarding, last: ReplicaPlan | None, plan: ReplicaPlan) -> None:
    """Say when a pod leaves traffic on trial, and when it had to come back."""
    was = last.out_of_traffic if last is not None else ()
    if plan.reason is Reason.REHEARSAL_FAILED:
        events.post(regarding, "RehearsalFailed", "PlanReplicas", plan.message)
    elif plan.out_of_traffic and not was:
        events.post(regarding, "RehearsalStarted", "PlanReplicas", plan.message)


def post_pod_problems(events: Events, regarding: Regarding, service: ServiceWorld, observation: Observation) -> None:
    """Events about ready pods that do not follow: stale, refusing, expired, or of another artifact."""
    for view in observation.ready:
        pod = service.pods[view.uid]
        if not service.runs_this_model(pod) and pod.report is not None and service.model is not None:
            note = (
                f"pod '{view.name}' loaded artifact {pod.report.model.digest}, PrismModel says {service.model.digest}; "
                "it gets no directive. Create a PrismModel for that artifact, or fix its `spec.digest`."
            )
            events.post(regarding, "ArtifactMismatch", "Poll", note)
        elif view.stale:
            note = f"no usable report of pod '{view.name}': {pod.problem or 'it was never heard'}"
            events.post(regarding, "SignalsStale", "Poll", note)
        if pod.refusal is not None and service.directive is not None:
            refused = pod.refusal
            note = f"pod '{view.name}' refused a directive with {refused.status}: {refused.refusal.error}"
            events.post(regarding, "DirectiveRejected", "Direct", note)
        if pod.report is not None and pod.report.held.state is EnvelopeState.EXPIRED:
            note = (
                f"the envelope of pod '{view.name}' ran out {pod.report.held.age_ms / 1000:.0f} s after its directive"
            )
            events.post(regarding, "EnvelopeExpired", "Poll", note)
    if unschedulable := [view.name for view in observation.pods if view.unschedulable]:
        note = f"no node fits pods {', '.join(sorted(unschedulable))}; add nodes, or lower `scaling.maxReplicas`"
        events.post(regarding, "PodsUnschedulable", "Schedule", note)


def export(service: ServiceWorld, policy: ServicePolicy, observation: Observation, elapsed_s: float) -> None:
    """Set the service's metrics."""
    names = service.key
    metrics.READY_REPLICAS.labels(*names).set(len(observation.ready))
    if observation.ordered_replicas is not None:
        metrics.DESIRED_REPLICAS.labels(*names).set(observation.ordered_replicas)
    if policy.price_per_hour is not None:
        metrics.COST_PER_HOUR.labels(*names).set(float(policy.price_per_hour) * len(observation.pods))
    if observation.pod_ready_times_s:
        metrics.POD_READY.labels(*names).set(observation.pod_ready_times_s[-1])
    heard = [pod.reported_s for view in observation.ready if (pod := service.pods[view.uid]).reported_s is not None]
    if heard:
        metrics.SIGNAL_AGE.labels(*names).set(max(0.0, observation.now_s - min(heard)))
    if service.budget_plan is None:
        return
    for target in service.budget_plan.classes:
        point = policy.ladder[target.point]
        metrics.BUDGET_RATIO.labels(*names, target.name).set(point.budget_permille / 1000)
        if target.point != FULL:
            metrics.DEGRADED_SECONDS.labels(*names, target.name).inc(elapsed_s)
        window = demand.window(service.demand, target.name, policy.by_name(target.name).window_s)
        if (attainment := demand.attainment(window)) is not None:
            metrics.ATTAINMENT_RATIO.labels(*names, target.name).set(attainment)
        if (quality := _mean_quality(dict(window.tokens_by_point), policy.ladder)) is not None:
            metrics.RELATIVE_QUALITY_RATIO.labels(*names, target.name).set(quality)


def _mean_quality(tokens_by_point: dict[str, int], ladder: Ladder) -> float | None:
    known = {point: tokens for point, tokens in tokens_by_point.items() if point in ladder}
    total = sum(known.values())
    if not total:
        return None
    return sum(tokens * float(ladder[point].relative_quality) for point, tokens in known.items()) / total
