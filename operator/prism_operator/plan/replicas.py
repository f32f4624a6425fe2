"""The slow decision: how many replicas to order.

    ask      max(ceil((1 + h/2) * need(top)), ceil((1 + h) * need(floor)))      h = headroom, reserve half in pods
    keep     ceil((1 + h) * need(top)) of the mean load                         the N/(N-1) test on the way down
    up       least ask of the up window, if above what is ordered; of twice the window while the knob holds the load
    down     largest keep of the down window, if below; one pod at a time, never before the window is full

`need(point)` is the real number of replicas that hold the offered load with every class at that point. Planning at the
top keeps quality; the second term of `ask` makes the floors hold a reserve, so that the budget can bridge. A pod that
is ordered runs for the down window at least, so a burst that ready pods hold at lower points may first show that it
lasts: an order is late by one window then, and no objective is missed for it.

Pods that are ordered and still start are part of what is ordered, so nothing is asked for twice; while some start, only
a higher ask than the one they answer adds more. A pod that starts for too long is reported and no longer waited for. It
is not replaced by ordering one more: a replica of the same template would most likely fail alike, up to the maximum.
"""

import math
from dataclasses import dataclass, replace

from prism_api.profile import Profile
from prism_api.service import BudgetControl, ScalingControl
from prism_operator.plan import capacity, demand
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.types import (
    DemandState,
    Observation,
    PodView,
    Reason,
    Recommendation,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
    Status,
)

EWMA_WEIGHT = 0.3
"""Weight of the newest pod-ready time in the expectation."""
REMEMBERED_STARTS = 10
PATIENCE = 2
"""Up windows that an ask must last through while ready pods hold the load at the floors."""
_ROUNDING = 1e-9
"""Keeps a need of exactly n replicas from asking for n + 1."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """One tick's recommendation. None: unknown, and then `reason` and `message` say what is missing."""

    up: int | None
    down: int | None
    reason: Reason
    message: str
    bridged: bool = False
    """Whether the ready pods hold the load once every class is at its floor, and may be sent there."""


def decide(
    observation: Observation, demand_state: DemandState, policy: ServicePolicy, state: ReplicaState
) -> tuple[ReplicaPlan, ReplicaState]:
    """Decide one slow tick. A managed count stays within [min, max] and the cost cap, whatever was ordered before.

    Counts that others own are passed on as they are; a cap that they exceed is a matter of the status.
    """
    ask = _ask(observation, demand_state, policy)
    state = _remember(observation.now_s, ask, policy, state)
    stuck = stuck_pods(observation, policy)
    plan = _owned_elsewhere(observation, policy, ask) or _outside_bounds(observation, policy, ask)
    if plan is None:
        plan, state = _managed(observation, demand_state, policy, state, ask, stuck)
    return replace(plan, stuck_pods=tuple(pod.name for pod in stuck)), state


def expected_ready_s(observation: Observation, policy: ServicePolicy) -> float:
    """Creation-to-Ready time to expect of a new pod: moving average of the measured ones."""
    times = observation.pod_ready_times_s
    if not times:
        return policy.loop.pod_ready_s
    expected = times[0]
    for measured in times[1:]:
        expected += EWMA_WEIGHT * (measured - expected)
    return expected


def stuck_pods(observation: Observation, policy: ServicePolicy) -> tuple[PodView, ...]:
    """Pods that start for longer than `stuck_factor` times the longest of the last starts."""
    slowest = max(observation.pod_ready_times_s[-REMEMBERED_STARTS:], default=policy.loop.pod_ready_s)
    limit_s = policy.loop.stuck_factor * slowest
    return tuple(
        pod
        for pod in observation.starting
        if observation.now_s - max(pod.created_s, pod.ready_s or pod.created_s) > limit_s
    )


def _ask(observation: Observation, state: DemandState, policy: ServicePolicy) -> _Ask:
    ready = observation.ready
    if not ready:
        return _Ask(None, None, Reason.IN_FLIGHT, "no pod is ready yet, so there is no load to plan for")
    if len(observation.fresh) < len(ready) / 2:
        text = f"only {len(observation.fresh)} of {len(ready)} ready pods reported freshly"
        return _Ask(None, None, Reason.SIGNALS_STALE, text)
    peak: list[ClassLoad] = []
    mean: list[ClassLoad] = []
    for class_policy in policy.classes:
        short = demand.short_rate(state, class_policy.name, policy)
        long = demand.long_rate(state, class_policy.name, policy)
        if short is None or long is None:
            return _Ask(None, None, Reason.SIGNALS_STALE, f"the load of class '{class_policy.name}' is unknown")
        if max(short.per_s, long.per_s) == 0:
            continue
        lengths = demand.mean_lengths(state, class_policy.name)
        if lengths is None:
            text = f"no request of class '{class_policy.name}' has finished yet, so the cost of one is unknown"
            return _Ask(None, None, Reason.STABILIZING, text)
        # Up follows the burst, for the up window takes the least ask; down follows the mean, for it takes the largest.
        peak.append(ClassLoad(class_policy, max(short.per_s, long.per_s), lengths))
        mean.append(ClassLoad(class_policy, long.per_s, lengths))
    profile = observation.profile and capacity.scaled(observation.profile, state.cost_factor)
    return _from_profile(profile, policy, peak, mean, len(ready)) or _from_saturation(observation, state, policy)


def _from_profile(
    profile: Profile | None, policy: ServicePolicy, peak: list[ClassLoad], mean: list[ClassLoad], ready: int
) -> _Ask | None:
    offered = sum(load.per_s for load in peak)
    if not peak:
        return _Ask(0, 0, Reason.DEMAND, "no load in fresh reports")
    if profile is None:
        return None
    floors = {class_policy.name: class_policy.floor for class_policy in policy.classes}
    tops = dict.fromkeys(floors, policy.max_point)
    top = capacity.replicas_for(peak, tops, profile)
    bottom = capacity.replicas_for(peak, floors, profile)
    kept = capacity.replicas_for(mean, tops, profile)
    if top is None or bottom is None or kept is None:
        return None
    headroom = policy.effective.headroom
    up = max(_ceil((1 + headroom / 2) * top), _ceil((1 + headroom) * bottom))
    bridged = policy.budget is BudgetControl.AUTO and _ceil(bottom) <= ready
    text = (
        f"offered {offered:.2f}/s needs {top:.2f} replicas at '{policy.max_point}' and {bottom:.2f} at the floors, "
        f"plus headroom {headroom:.2f}"
    )
    return _Ask(up, _ceil((1 + headroom) * kept), Reason.DEMAND, text, bridged)


def _from_saturation(observation: Observation, state: DemandState, policy: ServicePolicy) -> _Ask:
    """Without a profile: proportional law on measured saturation, with credit for pods that start.

    Source: the KEDA law of the llm-d workload autoscaling guide; n provisioned, c = ready/n, target 0.55, band to 0.40.
    """
    ready = len(observation.ready)
    provisioned = max(ready, observation.ordered_replicas or ready)
    worst: float | None = None
    for class_policy in policy.classes:
        seen = demand.window(state, class_policy.name, policy.loop.long_window_s)
        for histogram, objective_s in ((seen.ttft, class_policy.ttft_s), (seen.tpot, class_policy.tpot_s)):
            latency_s = demand.latency_quantile_s(histogram, class_policy.attainment_target)
            if latency_s is not None and objective_s is not None:
                worst = max(worst or 0.0, min(policy.loop.clamp, latency_s / objective_s))
    if worst is None:
        return _Ask(None, None, Reason.NO_PROFILE, "no profile, and no request finished in the long window")
    credited = worst * ready / provisioned
    target, low = policy.loop.target_saturation, policy.loop.low
    if worst > target:
        asked = provisioned + max(0, math.ceil(provisioned * (credited / target - 1)))
    elif worst < low:
        asked = max(1, provisioned - math.floor(provisioned * (1 - worst / low)))
    else:
        asked = provisioned
    text = f"no profile; saturation {worst:.2f} against a target of {target:.2f} on {ready} of {provisioned} replicas"
    return _Ask(asked, asked, Reason.NO_PROFILE, text)


def _ceil(replicas: float) -> int:
    # An objective out of reach at any rate needs infinitely many: say "more than any bound" and let bounds cut.
    return math.ceil(min(replicas, 1e6) - _ROUNDING)


def _remember(now_s: float, ask: _Ask, policy: ServicePolicy, state: ReplicaState) -> ReplicaState:
    since_s = now_s if state.since_s is None else state.since_s
    kept_s = max(PATIENCE * policy.effective.stabilization_up_s, policy.effective.stabilization_down_s)
    history = tuple(one for one in state.recommendations if one.at_s >= now_s - kept_s)
    repeated = bool(history) and history[-1].at_s >= now_s
    if ask.up is not None and ask.down is not None and not repeated:
        history = (*history, Recommendation(now_s, ask.up, ask.down))
    return replace(state, since_s=since_s, recommendations=history)


def _bounds(policy: ServicePolicy) -> tuple[int, int | None, Reason]:
    """Least and most replicas, and what sets the most."""
    most, reason = policy.max_replicas, Reason.MAX_REPLICAS
    cap = policy.cap_replicas
    if cap is not None and (most is None or cap < most):
        most, reason = cap, Reason.COST_CAP
    least = policy.min_replicas if most is None else min(policy.min_replicas, most)
    return least, most, reason


def _clamped(replicas: int, policy: ServicePolicy) -> tuple[int, Reason | None]:
    least, most, reason = _bounds(policy)
    if most is not None and replicas > most:
        return most, reason
    return max(replicas, least), None


def _owned_elsewhere(observation: Observation, policy: ServicePolicy, ask: _Ask) -> ReplicaPlan | None:
    """Paused, External and Fixed: the count is given; the recommendation is only published."""
    ordered = observation.ordered_replicas
    if policy.scaling is ScalingControl.MANAGED:
        if not policy.paused:
            return None
        held = policy.min_replicas if ordered is None else ordered
        return _plan(Status.HOLD, Reason.PAUSED, f"mode is Paused; would be: {ask.message}", held, ask, policy)
    assert policy.spec_replicas is not None, "External and Fixed without spec.replicas are refused by the CRD"
    reason = Reason.EXTERNAL if policy.scaling is ScalingControl.EXTERNAL else Reason.PINNED
    status = Status.HOLD if policy.spec_replicas == ordered else Status.PROGRESS
    text = f"spec.replicas is {policy.spec_replicas}, owned by {policy.scaling.value}; {ask.message}"
    return _plan(status, reason, text, policy.spec_replicas, ask, policy)


def _outside_bounds(observation: Observation, policy: ServicePolicy, ask: _Ask) -> ReplicaPlan | None:
    """A first order, or one that a changed spec has put out of bounds: repaired at once, whatever the load."""
    ordered = observation.ordered_replicas
    if ordered is None:
        text = f"first order: minReplicas {policy.min_replicas}"
        return _plan(Status.PROGRESS, Reason.DEMAND, text, _clamped(0, policy)[0], ask, policy)
    inside, limit = _clamped(ordered, policy)
    if inside == ordered:
        return None
    text = f"{ordered} ordered, but the bounds of the spec ask for {inside}"
    return _plan(Status.PROGRESS, limit or Reason.DEMAND, text, inside, ask, policy)


@dataclass(frozen=True, slots=True)
class _Tick:
    """What the managed decision looks at; `stuck` ends the message of whatever holds the count."""

    observation: Observation
    demand_since_s: float
    policy: ServicePolicy
    ask: _Ask
    ordered: int
    starting: int
    stuck: str

    def hold(self, status: Status, reason: Reason, text: str) -> ReplicaPlan:
        message = f"{self.ask.message}; {text}{self.stuck}" if text else f"{self.ask.message}{self.stuck}"
        return _plan(status, reason, message, self.ordered, self.ask, self.policy)

    def order(self, replicas: int, text: str) -> ReplicaPlan:
        message = f"{self.ask.message}; {text}"
        return _plan(Status.PROGRESS, Reason.DEMAND, message, replicas, self.ask, self.policy)


def _managed(
    observation: Observation,
    demand_state: DemandState,
    policy: ServicePolicy,
    state: ReplicaState,
    ask: _Ask,
    stuck: tuple[PodView, ...],
) -> tuple[ReplicaPlan, ReplicaState]:
    assert observation.ordered_replicas is not None, "the first order is given by _outside_bounds"
    names = ", ".join(pod.name for pod in stuck[:3])
    tick = _Tick(
        observation=observation,
        demand_since_s=observation.now_s if demand_state.since_s is None else demand_state.since_s,
        policy=policy,
        ask=ask,
        ordered=observation.ordered_replicas,
        starting=len(observation.starting) - len(stuck),
        stuck=f"; {len(stuck)} pods do not become ready ({names})" if stuck else "",
    )
    if ask.up is None or ask.down is None:
        return tick.hold(Status.HOLD, ask.reason, ""), state
    wanted, limit = _clamped(ask.up, policy)
    if wanted > tick.ordered:
        return _up(tick, ask.up, limit, state)
    if limit is not None and wanted == tick.ordered:
        return tick.hold(Status.BLOCKED, limit, f"the limit is {tick.ordered}"), state
    if wanted == tick.ordered or _clamped(ask.down, policy)[0] >= tick.ordered:
        missing = len(observation.ready) < tick.ordered
        reason = Reason.IN_FLIGHT if missing else Reason.STEADY
        status = Status.BLOCKED if stuck else Status.HOLD
        return tick.hold(status, reason, f"{tick.ordered - 1} would not hold it with headroom"), state
    return _down(tick, state)


def _up(tick: _Tick, asked: int, limit: Reason | None, state: ReplicaState) -> tuple[ReplicaPlan, ReplicaState]:
    now_s, policy = tick.observation.now_s, tick.policy
    if now_s - tick.demand_since_s < policy.loop.short_window_s:
        return tick.hold(Status.HOLD, Reason.STABILIZING, "demand is seen for too short a time"), state
    windows = PATIENCE if tick.ask.bridged else 1
    since_s = now_s - windows * policy.effective.stabilization_up_s
    lasting = min(_clamped(one.up, policy)[0] for one in state.recommendations if one.at_s >= since_s)
    if lasting <= tick.ordered:
        return tick.hold(Status.HOLD, Reason.STABILIZING, f"not asked for through {windows} up window(s)"), state
    if tick.starting > 0 and state.ordered_for is not None and asked <= state.ordered_for:
        eta_s = expected_ready_s(tick.observation, policy)
        text = f"{tick.starting} pods start for this already, expected ready {eta_s:.0f} s after creation"
        return tick.hold(Status.HOLD, Reason.IN_FLIGHT, text), state
    granted = min(lasting, tick.ordered + policy.effective.max_step)
    plan = replace(
        tick.order(granted, f"from {tick.ordered}"), limited_by=Reason.STEP_CAP if granted < lasting else limit
    )
    return plan, replace(state, ordered_for=asked)


def _down(tick: _Tick, state: ReplicaState) -> tuple[ReplicaPlan, ReplicaState]:
    now_s, policy = tick.observation.now_s, tick.policy
    seen_s = now_s - max(tick.demand_since_s, now_s if state.since_s is None else state.since_s)
    window_s = max(policy.effective.stabilization_down_s, policy.loop.long_window_s)
    if seen_s < window_s:
        text = f"scale-down needs {window_s:.0f} s of history, {max(0.0, seen_s):.0f} s seen"
        return tick.hold(Status.HOLD, Reason.STABILIZING, text), state
    keep = max(_clamped(one.down, policy)[0] for one in state.recommendations)
    if keep >= tick.ordered:
        return tick.hold(Status.HOLD, Reason.STABILIZING, f"the down window saw a need of {keep}"), state
    if state.lowered_s is not None and now_s - state.lowered_s < policy.loop.down_period_s:
        text = f"one pod less each {policy.loop.down_period_s:.0f} s"
        return tick.hold(Status.HOLD, Reason.STABILIZING, text), state
    plan = tick.order(tick.ordered - 1, f"from {tick.ordered}, largest need of the down window {keep}")
    return plan, replace(state, lowered_s=now_s, ordered_for=None)


def _plan(status: Status, reason: Reason, message: str, replicas: int, ask: _Ask, policy: ServicePolicy) -> ReplicaPlan:
    recommended = replicas if ask.up is None else max(ask.up, policy.min_replicas)
    limited = _clamped(recommended, policy)[1] if policy.scaling is ScalingControl.MANAGED else None
    return ReplicaPlan(status, reason, message, replicas, min(recommended, 1000), limited)
