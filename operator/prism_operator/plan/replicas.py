"""The slow decision: how many replicas to order. What the load asks for stands in `plan.need`.

    up       least ask of the up window, if above what is ordered; this tick's while not even the floors hold the load;
             what is asked for beyond what is ordered by little, only once the mean of the down window asks for it
    down     keep of the down window, if below; one pod at a time, never before the window is full

A pod that is ordered runs for the down window at least, so a load that ready pods hold at lower points must first show
that it lasts. Where they do not hold it, every second of waiting is paid with objectives, and nothing waits: `urgent`
says when the fast loop must not leave such an order to the slow loop's period.

Pods that are ordered and still start are part of what is ordered, so nothing is asked for twice; while some start, only
a higher ask than the one they answer adds more. A pod that starts for too long is reported and no longer waited for. It
is not replaced by ordering one more: a replica of the same template would most likely fail alike, up to the maximum.

Each count is cut, in this order, by the schedule's or the spec's bounds, the cost cap, the fleet's grant, the step cap
and the policies of `scaling.behavior`; what cut is named. A service that may be put to zero is, once it was idle for
long enough, and sleeps until it is woken or a schedule asks for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prism_api.scaling import ScalingControl
from prism_operator.plan import behavior, blind, demand, need, recommendation, rehearsal, schedule
from prism_operator.plan.behavior import Move
from prism_operator.plan.limits import Limits, limits
from prism_operator.plan.need import Ask
from prism_operator.plan.recommendation import Recommendation
from prism_operator.plan.starts import expected_ready_s, stuck_pods
from prism_operator.plan.types import (
    BudgetPlan,
    DemandState,
    FailedRehearsal,
    Observation,
    PodView,
    Reason,
    Rehearsal,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
    Status,
)

MOST_RECOMMENDED = 1000
"""Where a recommendation is cut off: an objective out of reach asks for any number."""


def decide(
    observation: Observation, demand_state: DemandState, policy: ServicePolicy, state: ReplicaState
) -> tuple[ReplicaPlan, ReplicaState]:
    """Decide one slow tick. A managed count stays within all limits, whatever was ordered before.

    Counts that others own are passed on as they are; a cap that they exceed is a matter of the status.
    """
    ready_s = expected_ready_s(observation, policy)
    bounds = schedule.bounds_at(policy, observation.unix_s, ready_s)
    policy = bounds.policy
    state = replace(
        state,
        forecasts=need.learn(state.forecasts, observation, demand_state, policy, ready_s),
        surprises=need.surprised(state.surprises, state.forecasts, observation, demand_state, policy, ready_s),
        idle_since_s=_idle_since_s(observation, demand_state, policy, state),
        blind_since_s=blind.since_s(observation, state.blind_since_s),
        rehearsal=rehearsal.current(observation, state.rehearsal),
    )
    ask = need.ask(observation, demand_state, policy, state.forecasts, state.surprises, ready_s)
    state = _remember(observation.now_s, ask, policy, state)
    tick = _Tick(
        observation=observation,
        demand=demand_state,
        policy=policy,
        limits=limits(bounds, asleep=_may_sleep(observation, policy, state)),
        ask=ask,
        ready_s=ready_s,
        stuck=stuck_pods(observation, policy),
    )
    plan = _owned_elsewhere(tick) or _outside_limits(tick)
    if plan is None:
        plan, state = _managed(tick, state)
    elif policy.scaling is not ScalingControl.MANAGED or policy.paused or policy.advisory:
        state = replace(state, rehearsal=None)
    state = replace(state, moves=_moves(tick, plan, state))
    away = (state.rehearsal.uid,) if state.rehearsal is not None else ()
    return replace(plan, stuck_pods=tuple(pod.name for pod in tick.stuck), out_of_traffic=away), state


def urgent(plan: BudgetPlan, policy: ServicePolicy, since_decision_s: float, ordered: int | None) -> bool:
    """Whether the slow loop must decide now: every class is at its floor, and the load does not fit there; or another
    service was granted what this one has ordered, and waits for it.

    Again after a short window, for as long as the first lasts: what presses may have grown since.
    """
    if policy.granted_replicas is not None and ordered is not None and ordered > policy.granted_replicas:
        return True
    at_floors = all(target.point == policy.by_name(target.name).floor for target in plan.classes)
    return plan.fits is False and at_floors and since_decision_s >= policy.loop.short_window_s


def _remember(now_s: float, ask: Ask, policy: ServicePolicy, state: ReplicaState) -> ReplicaState:
    since_s = now_s if state.since_s is None else state.since_s
    kept_s = max(policy.effective.stabilization_up_s, policy.effective.stabilization_down_s)
    history = tuple(one for one in state.recommendations if one.at_s >= now_s - kept_s)
    repeated = bool(history) and history[-1].at_s >= now_s
    if ask.asked is not None and not repeated:
        history = (*history, Recommendation(now_s, ask.asked))
    return replace(state, since_s=since_s, recommendations=history)


def _idle_since_s(
    observation: Observation, demand_state: DemandState, policy: ServicePolicy, state: ReplicaState
) -> float | None:
    """Since when fresh reports of every pod say that there is nothing to do; silence is not idleness."""
    if policy.idle_after_s is None or observation.ordered_replicas == 0:
        return state.idle_since_s
    rates = [demand.long_rate(demand_state, one.name, policy) for one in policy.classes]
    busy = any(pod.load is None or pod.load.running + pod.load.waiting > 0 for pod in observation.ready)
    heard = bool(observation.ready) and len(observation.fresh) == len(observation.ready)
    if busy or not heard or any(rate is None or rate.arrivals for rate in rates):
        return None
    return observation.now_s if state.idle_since_s is None else state.idle_since_s


def _woken(observation: Observation, policy: ServicePolicy) -> bool:
    """Somebody asked for the service, not longer ago than it may be idle."""
    woken_s, after_s = observation.woken_s, policy.idle_after_s
    return woken_s is not None and after_s is not None and 0 <= observation.now_s - woken_s < after_s


def _may_sleep(observation: Observation, policy: ServicePolicy, state: ReplicaState) -> bool:
    """Whether zero replicas are allowed now: asleep and not woken, or idle for long enough."""
    if policy.idle_after_s is None or _woken(observation, policy):
        return False
    if observation.ordered_replicas == 0:
        return True
    return state.idle_since_s is not None and observation.now_s - state.idle_since_s >= policy.idle_after_s


@dataclass(frozen=True, slots=True)
class _Tick:
    """What a decision looks at, and the shape of its answers."""

    observation: Observation
    demand: DemandState
    policy: ServicePolicy
    limits: Limits
    ask: Ask
    ready_s: float
    stuck: tuple[PodView, ...] = field(default=())

    @property
    def ordered(self) -> int:
        ordered = self.observation.ordered_replicas
        assert ordered is not None, "the first order is given by _outside_limits"
        return ordered

    @property
    def starting(self) -> int:
        """Pods that start and are waited for."""
        return len(self.observation.starting) - len(self.stuck)

    def hold(self, status: Status, reason: Reason, text: str = "", rejected: str = "") -> ReplicaPlan:
        """Keep what is ordered. Stuck pods end the message of whatever holds the count."""
        names = ", ".join(pod.name for pod in self.stuck[:3])
        stuck = f"{len(self.stuck)} pods do not become ready ({names})" if self.stuck else ""
        return self.plan(status, reason, self.ordered, "; ".join(filter(None, (text, stuck))), rejected)

    def order(self, reason: Reason, replicas: int, text: str, rejected: str = "") -> ReplicaPlan:
        return self.plan(Status.PROGRESS, reason, replicas, text, rejected)

    def plan(self, status: Status, reason: Reason, replicas: int, text: str, rejected: str = "") -> ReplicaPlan:
        recommended = replicas if self.ask.up is None else max(self.ask.up, self.limits.least)
        managed = self.policy.scaling is ScalingControl.MANAGED
        sentences = (self.ask.message, text, f"rejected {rejected}" if rejected else "")
        return ReplicaPlan(
            status=status,
            reason=reason,
            message="; ".join(filter(None, sentences)),
            replicas=replicas,
            recommended=min(recommended, MOST_RECOMMENDED),
            limited_by=self.limits.clamp(recommended)[1] if managed else None,
            inputs=self.ask.inputs,
            rejected=rejected,
        )


def _moves(tick: _Tick, plan: ReplicaPlan, state: ReplicaState) -> tuple[Move, ...]:
    now_s, ordered = tick.observation.now_s, tick.observation.ordered_replicas
    moves = behavior.remembered(state.moves, now_s)
    if ordered is None or plan.replicas == ordered or tick.policy.scaling is not ScalingControl.MANAGED:
        return moves
    return (*moves, Move(now_s, plan.replicas - ordered))


def _owned_elsewhere(tick: _Tick) -> ReplicaPlan | None:
    """Paused, Advisory, External and Fixed: the count is given; the recommendation is only published."""
    policy, ordered = tick.policy, tick.observation.ordered_replicas
    if policy.scaling is ScalingControl.MANAGED:
        if not (policy.paused or policy.advisory):
            return None
        held = max(1, policy.min_replicas) if ordered is None else ordered
        mode = Reason.PAUSED if policy.paused else Reason.ADVISORY
        return tick.plan(Status.HOLD, mode, held, f"mode is {mode}; this would be planned")
    assert policy.spec_replicas is not None, "External and Fixed without spec.replicas are refused by the CRD"
    reason = Reason.EXTERNAL if policy.scaling is ScalingControl.EXTERNAL else Reason.PINNED
    status = Status.HOLD if policy.spec_replicas == ordered else Status.PROGRESS
    text = f"spec.replicas is {policy.spec_replicas}, owned by {policy.scaling.value}"
    return tick.plan(status, reason, policy.spec_replicas, text)


def _outside_limits(tick: _Tick) -> ReplicaPlan | None:
    """A first order, or one that the limits of this moment do not allow: repaired at once, whatever the load."""
    ordered = tick.observation.ordered_replicas
    if ordered is None:
        least = tick.limits.clamp(1)[0]
        return tick.order(Reason.DEMAND, least, f"first order: the least that may serve is {least}")
    inside, cut = tick.limits.clamp(ordered)
    if inside == ordered:
        return None
    if ordered == 0 and _woken(tick.observation, tick.policy):
        return tick.order(Reason.WOKEN, inside, "woken")
    text = f"{ordered} ordered, but the bounds in force ask for {inside}"
    return tick.order(cut or tick.limits.least_by, inside, text)


def _managed(tick: _Tick, state: ReplicaState) -> tuple[ReplicaPlan, ReplicaState]:
    ask = tick.ask
    if tick.ordered == 0:
        text = "sleeps at zero replicas; the annotation 'moeprism.io/wake' or a schedule wakes it"
        return tick.hold(Status.HOLD, Reason.IDLE, text), state
    failed = _failed_rehearsal(tick, state)
    if failed is not None and state.rehearsal is not None:
        lesson = FailedRehearsal(tick.observation.now_s, state.rehearsal.kept)
        state = replace(state, rehearsal=None, rehearsal_failed=lesson)
    if ask.up is None or ask.down is None:
        return _unseen(tick, state), state
    wanted, cut = tick.limits.clamp(ask.up)
    if wanted > tick.ordered:
        return _up(tick, ask.up, cut, state)
    if cut is not None and wanted == tick.ordered:
        rejected = f"{ask.up}: the limit is {tick.ordered}"
        return tick.hold(Status.BLOCKED, cut, rejected=rejected), state
    if failed is not None:
        rejected = f"{tick.ordered - 1}: {failed}"
        return tick.hold(Status.HOLD, Reason.REHEARSAL_FAILED, "the pod is back in traffic", rejected), state
    if wanted == tick.ordered or tick.limits.clamp(ask.down)[0] >= tick.ordered:
        missing = len(tick.observation.ready) < tick.ordered and state.rehearsal is None
        reason = Reason.IN_FLIGHT if missing else Reason.STEADY
        status = Status.BLOCKED if tick.stuck else Status.HOLD
        return tick.hold(status, reason, rejected=f"{tick.ordered - 1}: would not hold it with headroom"), state
    return _down(tick, state)


def _unseen(tick: _Tick, state: ReplicaState) -> ReplicaPlan:
    """Without an ask the count stays, unless the spec says what it should be while reports are missing."""
    if state.blind_since_s is None:
        return tick.hold(Status.HOLD, tick.ask.reason)
    blind_s = tick.observation.now_s - state.blind_since_s
    wanted = tick.limits.clamp(blind.replicas(tick.policy, tick.ordered, blind_s))[0]
    step = tick.policy.effective.max_step
    granted = max(tick.ordered - step, min(wanted, tick.ordered + step))
    if granted == tick.ordered:
        return tick.hold(Status.HOLD, tick.ask.reason)
    rule = tick.policy.effective.scaling_on_signal_loss.behavior
    text = f"for {blind_s:.0f} s: scaling.onSignalLoss is {rule}, so from {tick.ordered} towards {wanted}"
    return tick.order(Reason.SIGNALS_STALE, granted, text)


def _up(tick: _Tick, asked: int, cut: Reason | None, state: ReplicaState) -> tuple[ReplicaPlan, ReplicaState]:
    now_s, policy = tick.observation.now_s, tick.policy
    wanted = tick.limits.clamp(asked)[0]
    seen_since_s = now_s if tick.demand.since_s is None else tick.demand.since_s
    if now_s - seen_since_s < policy.loop.short_window_s:
        rejected = f"{wanted}: demand is seen for too short a time"
        return tick.hold(Status.HOLD, Reason.STABILIZING, rejected=rejected), state
    since_s = now_s - (policy.effective.stabilization_up_s if tick.ask.held else 0)
    window = [one.asked for one in state.recommendations if one.at_s >= since_s]
    lasting = min(tick.limits.clamp(asked.up)[0] for asked in window)
    if lasting <= tick.ordered:
        rejected = f"{wanted}: not asked for through the up window"
        return tick.hold(Status.HOLD, Reason.STABILIZING, rejected=rejected), state
    little = min(asked.at_once for asked in window) <= tick.ordered
    if tick.ask.held and little and recommendation.lasting(state.recommendations) <= tick.ordered:
        rejected = f"{wanted}: little more than what is ordered, and not for as long as the down window"
        return tick.hold(Status.HOLD, Reason.STABILIZING, rejected=rejected), state
    if tick.starting > 0 and state.ordered_for is not None and asked <= state.ordered_for:
        text = f"{tick.starting} pods start for this already, expected ready {tick.ready_s:.0f} s after creation"
        return tick.hold(Status.HOLD, Reason.IN_FLIGHT, text), state
    granted = min(lasting, tick.ordered + policy.effective.max_step)
    room = behavior.room(policy.effective.pace_up, behavior.UP, tick.ordered, state.moves, now_s)
    if room == 0:
        rejected = f"{wanted}: scaling.behavior.scaleUp allows no more yet"
        return tick.hold(Status.BLOCKED, Reason.STEP_CAP, rejected=rejected), state
    granted = granted if room is None else min(granted, tick.ordered + room)
    rejected = f"{asked}: {granted - tick.ordered} more at this tick" if granted < asked else ""
    plan = tick.order(Reason.DEMAND, granted, f"from {tick.ordered}", rejected)
    return replace(plan, limited_by=Reason.STEP_CAP if granted < lasting else cut), replace(state, ordered_for=lasting)


def _down(tick: _Tick, state: ReplicaState) -> tuple[ReplicaPlan, ReplicaState]:
    now_s, policy, fewer = tick.observation.now_s, tick.policy, tick.ordered - 1

    def wait(text: str) -> tuple[ReplicaPlan, ReplicaState]:
        return tick.hold(Status.HOLD, Reason.STABILIZING, rejected=f"{fewer}: {text}"), state

    began_s = max(now_s if one is None else one for one in (tick.demand.since_s, state.since_s))
    window_s = max(policy.effective.stabilization_down_s, policy.loop.long_window_s)
    if now_s - began_s < window_s:
        return wait(f"scale-down needs {window_s:.0f} s of history, {max(0.0, now_s - began_s):.0f} s seen")
    keep = tick.limits.clamp(recommendation.kept(state.recommendations))[0]
    if keep >= tick.ordered:
        return wait(f"the down window saw a need of {keep}")
    pace, period_s = policy.effective.pace_down, policy.loop.down_period_s
    if behavior.room(pace, behavior.DOWN, tick.ordered, state.moves, now_s) == 0:
        return wait("scaling.behavior.scaleDown allows no fewer yet")
    if not pace.policies and any(move.by < 0 and now_s - move.at_s < period_s for move in state.moves):
        return wait(f"one pod less each {period_s:.0f} s")
    if policy.loop.rehearsal_s > 0 and fewer > 0:
        if state.rehearsal is None:
            return _begin_rehearsal(tick, state, keep)
        left_s = policy.loop.rehearsal_s - (now_s - state.rehearsal.since_s)
        if left_s > 0:
            text = f"'{state.rehearsal.name}' is out of traffic, {left_s:.0f} s to go"
            return tick.hold(Status.HOLD, Reason.REHEARSAL, text), state
        state = replace(state, rehearsal=replace(state.rehearsal, passed=True))
    reason = Reason.DEMAND if fewer else Reason.IDLE
    text = f"from {tick.ordered}, need of the down window {keep}"
    return tick.order(reason, fewer, text), replace(state, ordered_for=None)


def _begin_rehearsal(tick: _Tick, state: ReplicaState, keep: int) -> tuple[ReplicaPlan, ReplicaState]:
    now_s, fewer, lesson = tick.observation.now_s, tick.ordered - 1, state.rehearsal_failed
    again_s = 2 * tick.policy.effective.stabilization_down_s
    refusal = rehearsal.why_not_now(tick.observation, tick.stuck)
    if refusal is None and lesson is not None and keep >= lesson.kept and now_s - lesson.at_s < again_s:
        refusal = f"the last rehearsal failed less than {again_s} s ago, and the load needs as much as then"
    if refusal is not None:
        return tick.hold(Status.HOLD, Reason.REHEARSAL, rejected=f"{fewer}: {refusal}"), state
    pod = rehearsal.victim(tick.observation)
    text = f"'{pod.name}' leaves traffic for {tick.policy.loop.rehearsal_s:.0f} s"
    state = replace(state, rehearsal=Rehearsal(pod.uid, pod.name, now_s, keep))
    return tick.hold(Status.HOLD, Reason.REHEARSAL, text), state


def _failed_rehearsal(tick: _Tick, state: ReplicaState) -> str | None:
    """Why a rehearsal under way must end; None if there is none, or it goes well."""
    if state.rehearsal is None or state.rehearsal.passed:
        return None
    if tick.ask.down is None:
        return tick.ask.message
    if tick.limits.clamp(tick.ask.down)[0] >= tick.ordered:
        return "the load has risen"
    nominal: Mapping[str, str] = tick.ask.nominal
    return rehearsal.failure(tick.observation, tick.demand, tick.policy, state.rehearsal, nominal)
