"""The fast decision: operating point, envelope and admission of every class, once a second.

Down, all steps at once:
    if offered load does not fit ready capacity at the current points, take the highest points at which it does;
    if latency says saturated (above `high`) although it fits, take one step. Nothing but missed objectives asks for the
    next while the window of latencies holds some from before it, nor for any in a pool's first minute. In the minute
    after a pod joined others latency says nothing: that pod gets every request, the others none, and what is slow there
    is its governor's matter.
Up, one step after a dwell:
    if saturation is below `low`, is predicted to stay below `high` at the point above, and load would fit there: with a
    margin throughout the dwell, or without one throughout the slow loop's down window. Without the second, a load that
    just fits what was ordered for it would keep quality down for good; with a shorter window, noise would flap. A step
    up that one step down takes back within a minute was one too early: the next waits for twice the dwell, up to eight;
    one that was not halves it.

Which class sinks and rises first is `plan.brownout`'s matter. Floors are absolute, and may be lifted for a time: see
`plan.floors`. When every class is at its floor and load still does not fit, classes that allow it are shed, lowest
first.

Worked example: two pods hold 3/s each at `full`, 4.8/s each at `b500`. Load steps from 4/s to 7/s: 7 * 1.05 > 6, so the
batch class sinks, then the interactive one, until 7.35 fits: seconds, not the minutes of a third pod. The slow loop
orders it; when it is ready, 7 * 1.15 < 9 holds, and after the dwell the classes rise step by step.

Only ready pods count, so a scale-up is bridged, a lost pod is covered and a rollout is carried by the same rule; they
differ in the reason given.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from prism_api import FULL
from prism_api.service import BudgetControl
from prism_operator.plan import blind, floors, starts
from prism_operator.plan.brownout import by_priority, next_up, steps_down
from prism_operator.plan.floors import Lift
from prism_operator.plan.pressure import Pressure, measure
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    ClassBudgetState,
    ClassPolicy,
    DemandState,
    Observation,
    Reason,
    ServicePolicy,
    Status,
)
from prism_operator.plan.verdicts import Points, Verdict, assemble, calm, listed, offered, resting

_ABSENCES = (Reason.BURST_BRIDGE, Reason.POD_LOST, Reason.ROLLOUT, Reason.REHEARSAL)
FLAP_S = 60.0
"""A point that goes back within a minute has flapped."""
MOST_PATIENCE = 8


def decide(
    observation: Observation, demand: DemandState, policy: ServicePolicy, state: BudgetState
) -> tuple[BudgetPlan, BudgetState]:
    """Decide one tick. The plan never leaves [floor, max] of a class and always says why.

    After a start `state` is empty: the first plan repeats the points that pods report, and nothing is sent before one
    of them reported.
    """
    state = floors.drain(observation, policy, _remember_pods(observation, state))
    if missing := [p for p in policy.classes if p.name not in state.classes]:
        return _adopt(observation, policy, state, missing)
    policy, lifts = floors.lifted(observation, policy, state)
    before = {name: remembered.point for name, remembered in state.classes.items()}
    state = _inside_bounds(policy, state)
    if (fixed := _unsteered(observation, policy, state)) is not None:
        return fixed
    pressure = measure(observation, demand, policy, state)
    if policy.advisory:
        return _advised(observation, policy, state, pressure)
    return _steer(observation, policy, state, pressure, before, lifts)


def _remember_pods(observation: Observation, state: BudgetState) -> BudgetState:
    """Notice ready pods that stopped being ready without having been told to stop."""
    stopping = {pod.uid for pod in observation.pods if pod.deleting or not pod.serving}
    ready = tuple(pod.uid for pod in observation.ready)
    lost = set(state.known_pods) - set(ready) - stopping
    whole = observation.ordered_replicas is not None and len(ready) >= observation.ordered_replicas
    lost_s = observation.now_s if lost else None if whole else state.lost_s
    # A pod seen deleting is forgotten, so that its disappearance later is not taken for a loss.
    since_s = observation.now_s if state.bridging_since_s is None else state.bridging_since_s
    return replace(
        state,
        known_pods=ready,
        lost_s=lost_s,
        bridging_since_s=since_s if observation.missing > 0 else None,
        blind_since_s=blind.since_s(observation, state.blind_since_s),
    )


def _adopt(
    observation: Observation, policy: ServicePolicy, state: BudgetState, missing: list[ClassPolicy]
) -> tuple[BudgetPlan, BudgetState]:
    """Take over the points that pods run at; a class that no pod knows starts at the top."""
    reporting = [pod for pod in observation.pods if pod.points and not pod.stale and not pod.deleting]
    if not reporting:
        text = f"none of {len(observation.pods)} pods has reported yet; nothing is sent until one does"
        return BudgetPlan(Status.HOLD, Reason.SIGNALS_STALE, text, ()), state
    classes = dict(state.classes)
    for class_policy in missing:
        held = Counter(
            pod.points[class_policy.name] for pod in reporting if pod.points.get(class_policy.name) in policy.ladder
        )
        # Of equally common points the higher one: quality is given up by decision, not by a tie.
        common = max(held, key=lambda point: (held[point], policy.ladder.index(point)), default=policy.max_point)
        point = policy.ladder.clamp(common, class_policy.floor, policy.max_point)
        cause = Reason.STEADY if point == policy.max_point else Reason.BROWNOUT
        left_s = observation.degraded_left_s.get(class_policy.name)
        classes[class_policy.name] = ClassBudgetState(point, observation.now_s, cause=cause, degraded_left_s=left_s)
    state = replace(state, classes=classes)
    text = f"repeats what {len(reporting)} pods run at"
    verdicts = {p.name: Verdict(classes[p.name].point, Status.HOLD, Reason.ADOPTED, text) for p in policy.classes}
    return assemble(observation, policy, state, verdicts), state


def _inside_bounds(policy: ServicePolicy, state: BudgetState) -> BudgetState:
    """Forget removed classes; move points into bounds that a new spec may have changed."""
    classes = {}
    for class_policy in policy.classes:
        remembered = state.classes[class_policy.name]
        known = remembered.point if remembered.point in policy.ladder else policy.max_point
        point = policy.ladder.clamp(known, class_policy.floor, policy.max_point)
        classes[class_policy.name] = replace(remembered, point=point)
    return replace(state, classes=classes)


def _unsteered(
    observation: Observation, policy: ServicePolicy, state: BudgetState
) -> tuple[BudgetPlan, BudgetState] | None:
    """Plans that look at no load: paused, off, fixed, blind. None if the budget is to be steered."""
    points = {name: remembered.point for name, remembered in state.classes.items()}
    status = Status.HOLD
    if policy.paused:
        reason, text = Reason.PAUSED, "mode is Paused; points are held"
    elif policy.budget is BudgetControl.OFF:
        points = dict.fromkeys(points, FULL)
        reason, text = Reason.AT_FULL, "budget.control is Off; every class runs at 'full'"
    elif policy.budget is BudgetControl.FIXED:
        assert policy.fixed_point is not None, "Fixed without a point is refused by the CRD"
        points = {p.name: policy.ladder.clamp(policy.fixed_point, p.floor, policy.max_point) for p in policy.classes}
        reason, text = Reason.PINNED, f"budget.control is Fixed at '{policy.fixed_point}', raised to floors"
    elif observation.ordered_replicas == 0:
        reason, text = Reason.IDLE, "the service sleeps at zero replicas"
    elif not observation.ready:
        status, reason, text = Status.BLOCKED, Reason.SIGNALS_STALE, "no ready pod; nothing to steer"
    elif state.blind_since_s is not None:
        status, reason = Status.BLOCKED, Reason.SIGNALS_STALE
        points, what = blind.points(policy, points, observation.now_s - state.blind_since_s)
        text = f"{blind.said(observation)}; {what}"
    else:
        return None
    state = _moved(policy, state, points, observation.now_s, Reason.STEADY)
    verdicts = {name: Verdict(point, status, reason, text) for name, point in points.items()}
    return assemble(observation, policy, state, verdicts, pinned=reason is not Reason.SIGNALS_STALE), state


def _advised(
    observation: Observation, policy: ServicePolicy, state: BudgetState, pressure: Pressure
) -> tuple[BudgetPlan, BudgetState]:
    """Every class at `full`, and what the load at this moment would have them do: without memory, for nothing moves."""
    tops = dict.fromkeys(state.classes, policy.max_point)
    why_down = _why_down(policy, pressure, tops, math.inf)
    advised = tops if why_down is None else _lowered(policy, pressure, tops)
    verdicts = {}
    for name, point in advised.items():
        text = f"mode is Advisory; would run at '{point}': {why_down or calm(pressure, name)}"
        verdicts[name] = Verdict(FULL, Status.HOLD, Reason.ADVISORY, text)
    state = _moved(policy, state, tops, observation.now_s, Reason.STEADY)
    plan = assemble(observation, policy, state, verdicts, pressure, pinned=True)
    return replace(plan, advised=advised), state


def _steer(
    observation: Observation,
    policy: ServicePolicy,
    state: BudgetState,
    pressure: Pressure,
    held: Points,
    lifts: Mapping[str, Lift],
) -> tuple[BudgetPlan, BudgetState]:
    before = {name: remembered.point for name, remembered in state.classes.items()}
    cause = _cause(observation, policy, state, pressure, before)
    since_move_s = observation.now_s - max(remembered.moved_s for remembered in state.classes.values())
    why_down = _why_down(policy, pressure, before, since_move_s)
    dwelt = since_move_s >= policy.effective.dwell_down_ms / 1000
    bridgeable = policy.effective.bridge_scale_up or pressure.ordered <= pressure.ready
    if why_down is not None and dwelt and bridgeable:
        after = _lowered(policy, pressure, before)
        verdicts = _down_verdicts(policy, pressure, before, after, cause, why_down)
        state = _moved(policy, _restart_dwell(state), after, observation.now_s, cause)
    else:
        after, verdicts, state = _raised(observation, policy, state, pressure, before, cause, why_down)
    state = _admission(policy, state, pressure, after)
    verdicts = _with_lifts(verdicts, lifts, held)
    verdicts = _with_stuck_bridge(observation, policy, state, verdicts)
    return assemble(observation, policy, state, verdicts, pressure), state


def _with_lifts(verdicts: dict[str, Verdict], lifts: Mapping[str, Lift], held: Points) -> dict[str, Verdict]:
    """A class whose floor is lifted for now says so, and whether that moved it."""
    return {
        name: verdict
        if name not in lifts
        else replace(
            verdict,
            status=Status.PROGRESS if verdict.point != held.get(name, verdict.point) else verdict.status,
            reason=lifts[name].reason,
            message=f"{lifts[name].message}; {verdict.message}",
        )
        for name, verdict in verdicts.items()
    }


def _with_stuck_bridge(
    observation: Observation, policy: ServicePolicy, state: BudgetState, verdicts: dict[str, Verdict]
) -> dict[str, Verdict]:
    """A bridge that lasts for longer than starts take is no bridge: it must not keep quality down unnoticed."""
    since_s = state.bridging_since_s
    if since_s is None or observation.now_s - since_s <= starts.patience_s(observation, policy):
        return verdicts
    text = f"{observation.missing} replicas have been missing for {observation.now_s - since_s:.0f} s"
    return {
        name: verdict
        if verdict.point == policy.max_point or verdict.status is Status.PROGRESS
        else replace(verdict, status=Status.BLOCKED, message=f"{text}; {verdict.message}")
        for name, verdict in verdicts.items()
    }


def _cause(
    observation: Observation, policy: ServicePolicy, state: BudgetState, pressure: Pressure, points: Points
) -> Reason:
    """What a shortage is called: the absence of pods that are expected, if these would end it, else too much load."""
    if observation.rehearsed:
        return Reason.REHEARSAL
    if pressure.ordered > pressure.ready:
        if state.lost_s is not None:
            return Reason.POD_LOST
        if observation.rollout:
            return Reason.ROLLOUT
        if pressure.fits(points, policy.loop.rate_margin, ordered=True) is not False:
            return Reason.BURST_BRIDGE
    return Reason.BROWNOUT


def _why_down(policy: ServicePolicy, pressure: Pressure, points: Points, since_move_s: float) -> str | None:
    """The sentence that demands a lower budget, or None."""
    loop = policy.loop
    fits = pressure.fits(points, loop.rate_margin)
    if fits is False:
        return f"offered {offered(pressure)} exceeds {pressure.ready} ready pods at {listed(points)}"
    if fits is None and pressure.backlog > pressure.ready:
        return f"{pressure.backlog} requests wait on {pressure.ready} ready pods, and capacity is not known"
    if fits and pressure.joining:
        return None
    telling = since_move_s > loop.short_window_s and pressure.settled_s > loop.long_window_s
    high = loop.high if telling or fits is None else 1.0
    hot = {name: s for name, s in pressure.saturation.items() if s is not None and s > high}
    if hot:
        name = max(hot, key=lambda key: hot[key])
        return f"saturation of '{name}' {hot[name]:.2f} > {high:.2f}"
    return None


def _lowered(policy: ServicePolicy, pressure: Pressure, points: Points) -> Points:
    """The first combination on the way down that fits; one step if load fits already, all floors if nothing does."""
    fits_already = pressure.fits(points, policy.loop.rate_margin) is not False
    step = points
    for step in steps_down(policy, pressure, points):
        if fits_already or pressure.fits(step, policy.loop.rate_margin):
            break
    return step


def _down_verdicts(
    policy: ServicePolicy, pressure: Pressure, before: Points, after: Points, cause: Reason, why: str
) -> dict[str, Verdict]:
    verdicts = {}
    for class_policy in policy.classes:
        name, point = class_policy.name, after[class_policy.name]
        if point != before[name]:
            upper = policy.ladder.points[policy.ladder.index(point) + 1].name
            rejected = f"'{upper}': {_why_not(pressure, {**after, name: upper}, policy)}"
            verdicts[name] = Verdict(point, Status.PROGRESS, cause, why, rejected)
        elif point == class_policy.floor:
            # While pods are missing, that is why the class is this low.
            reason = Reason.AT_FLOOR if point == policy.max_point or cause is Reason.BROWNOUT else cause
            status = Status.BLOCKED if after == before else Status.HOLD
            verdicts[name] = Verdict(point, status, reason, f"{why}; '{point}' is the floor")
        else:
            text = f"{why}; another class sinks first"
            verdicts[name] = Verdict(point, Status.HOLD, resting(policy, point), text)
    return verdicts


def _raised(
    observation: Observation,
    policy: ServicePolicy,
    state: BudgetState,
    pressure: Pressure,
    before: Points,
    cause: Reason,
    why_down: str | None,
) -> tuple[Points, dict[str, Verdict], BudgetState]:
    """Hold, or take the one step up that is due: the highest-priority class below its top."""
    verdicts: dict[str, Verdict] = {}
    classes = dict(state.classes)
    candidate = next_up(policy, pressure, before)
    for class_policy in policy.classes:
        name, remembered = class_policy.name, classes[class_policy.name]
        point = before[name]
        if point == policy.max_point:
            classes[name] = replace(remembered, low_since_s=None, narrow_since_s=None, cause=Reason.STEADY)
            text = why_down or calm(pressure, name)
            verdicts[name] = Verdict(point, Status.HOLD, resting(policy, point), text)
            continue
        # While pods are missing, that is why the class is low, whatever sent it down first; afterwards it is not.
        ended = cause is Reason.BROWNOUT and remembered.cause in _ABSENCES and not observation.missing
        reason = Reason.BROWNOUT if ended else cause if cause is not Reason.BROWNOUT else remembered.cause
        if class_policy is not candidate or why_down is not None:
            classes[name] = replace(remembered, low_since_s=None, narrow_since_s=None, cause=reason)
            text = why_down or f"{calm(pressure, name)}; another class rises first"
            verdicts[name] = Verdict(point, Status.HOLD, reason, text)
            continue
        upper = policy.ladder.points[policy.ladder.index(point) + 1].name
        loop, now_s = policy.loop, observation.now_s
        refused = _why_not_up(observation, policy, pressure, name, before, upper, loop.restore_rate_margin)
        barely = refused and _why_not_up(observation, policy, pressure, name, before, upper, loop.rate_margin)
        since = now_s if remembered.low_since_s is None else remembered.low_since_s
        narrow = now_s if remembered.narrow_since_s is None else remembered.narrow_since_s
        if barely is not None or (refused is not None and now_s - narrow < policy.effective.stabilization_down_s):
            narrow_since_s = narrow if barely is None else None
            classes[name] = replace(remembered, low_since_s=None, narrow_since_s=narrow_since_s, cause=reason)
            verdicts[name] = Verdict(point, Status.HOLD, reason, calm(pressure, name), f"'{upper}': {refused}")
            continue
        dwell_s = remembered.patience * policy.effective.dwell_up_ms / 1000
        calm_s = now_s - (since if refused is None else narrow)
        if calm_s < dwell_s:
            classes[name] = replace(remembered, low_since_s=since, narrow_since_s=narrow, cause=reason)
            text = f"{calm(pressure, name)}; '{upper}' in {dwell_s - calm_s:.0f} s if this lasts"
            verdicts[name] = Verdict(point, Status.HOLD, Reason.DWELL, text)
            continue
        kept = remembered.risen_s is not None and remembered.risen_s >= remembered.moved_s
        classes[name] = replace(
            remembered,
            point=upper,
            moved_s=now_s,
            risen_s=now_s,
            patience=max(1, remembered.patience // 2) if kept else remembered.patience,
            low_since_s=None,
            narrow_since_s=None,
            cause=reason,
        )
        text = f"{calm(pressure, name)} for {calm_s:.0f} s; '{upper}' fits"
        verdicts[name] = Verdict(upper, Status.PROGRESS, Reason.RESTORE, text)
    after = {name: remembered.point for name, remembered in classes.items()}
    return after, verdicts, replace(state, classes=classes)


def _why_not_up(
    observation: Observation,
    policy: ServicePolicy,
    pressure: Pressure,
    name: str,
    points: Points,
    upper: str,
    margin: float,
) -> str | None:
    """Why a class may not rise to `upper` now, or None if it may; `margin` is the share of load to have to spare."""
    loop = policy.loop
    if any(rate is None for rate in pressure.rates.values()):
        return "the load of some class is unknown"
    saturation = pressure.saturation[name]
    if saturation is not None and saturation >= loop.low:
        return f"saturation {saturation:.2f} is not below {loop.low:.2f}"
    candidate = {**points, name: upper}
    budgets = {point.name: point.budget_permille for point in policy.ladder.points}
    predicted = pressure.predicted(name, points, candidate, budgets)
    if predicted is not None and predicted >= loop.high - loop.restore_margin:
        return f"saturation would be {predicted:.2f}, not below {loop.high - loop.restore_margin:.2f}"
    if pressure.fits(candidate, margin) is False:
        return f"offered {offered(pressure)} does not fit {pressure.ready} ready pods there with a margin"
    if any(pod.points.get(name, points[name]) != points[name] for pod in observation.fresh):
        return f"not every pod runs at '{points[name]}' yet"
    return None


def _why_not(pressure: Pressure, points: Points, policy: ServicePolicy) -> str:
    fits = pressure.fits(points, policy.loop.rate_margin)
    return "load would not fit" if fits is False else "saturated" if fits else "capacity not known"


def _admission(policy: ServicePolicy, state: BudgetState, pressure: Pressure, points: Points) -> BudgetState:
    """Shed lowest priority first, only at all floors; end it with a margin, so that it does not flap."""
    shedding = {name for name, remembered in state.classes.items() if remembered.shedding}
    margin = policy.loop.restore_rate_margin if shedding else policy.loop.rate_margin
    at_floors = all(points[p.name] == p.floor or pressure.rates[p.name] == 0.0 for p in policy.classes)
    shed: set[str] = set()
    if at_floors:
        for class_policy in by_priority(policy):
            if pressure.fits(points, margin, without=frozenset(shed)) is not False:
                break
            if class_policy.sheds:
                shed.add(class_policy.name)
    classes = {name: replace(remembered, shedding=name in shed) for name, remembered in state.classes.items()}
    return replace(state, classes=classes)


def _moved(policy: ServicePolicy, state: BudgetState, points: Points, now_s: float, cause: Reason) -> BudgetState:
    classes = {
        name: remembered
        if remembered.point == points[name]
        else replace(
            remembered,
            point=points[name],
            moved_s=now_s,
            low_since_s=None,
            narrow_since_s=None,
            cause=cause,
            patience=_patience(policy, remembered, points[name], now_s),
        )
        for name, remembered in state.classes.items()
    }
    return replace(state, classes=classes)


def _patience(policy: ServicePolicy, remembered: ClassBudgetState, point: str, now_s: float) -> int:
    steps = policy.ladder.index(remembered.point) - policy.ladder.index(point)
    if steps == 1 and remembered.risen_s is not None and now_s - remembered.risen_s <= FLAP_S:
        return min(MOST_PATIENCE, 2 * remembered.patience)
    return max(1, remembered.patience // 2)


def _restart_dwell(state: BudgetState) -> BudgetState:
    return replace(
        state, classes={name: replace(c, low_since_s=None, narrow_since_s=None) for name, c in state.classes.items()}
    )
