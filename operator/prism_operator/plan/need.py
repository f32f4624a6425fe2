"""How many replicas the load asks for, before any bound, window or step cap.

    up      max((1 + u*h) * need(nominal, mean), need(floors, burst))
    keep    max((1 + k*h) * need(nominal, mean), need(floors, burst) at costs that may be worse)

`need(points, load)` is the real number of replicas that hold a load with the classes at these points, h the headroom,
and (u, k) its shares by `scaling.reserve`: how much of it stands in idle pods. k above u is the hysteresis of the
N/(N-1) test. Nominal points are the tops: planned at the floors, no reserve would be left. Only `cost.targetPerHour`
lowers them, to the highest points whose count fits it.

Replicas follow the mean, the budget what exceeds it. So what stands at the tops is the mean load: the larger of the
forecast at the time when an ordered pod is ready and the rate seen, over the slow period on the way up and over the
long window on the way down. What must fit with all classes at their floors is a burst: the mean and h more, or as
much more as the last lead times brought unexpectedly (`plan.surprise`; not if the spec sets a headroom), or, on the way
up, what presses now. Where the budget is not this planner's to move, the burst must fit at the points as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_api.profile import Profile
from prism_api.scaling import ForecastMethod, Reserve
from prism_api.service import BudgetControl
from prism_operator.plan import blind, calibration, capacity, demand, forecast, surprise
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.forecast import ForecastState, Method
from prism_operator.plan.recommendation import TOLERANCE, Asked, flat, whole
from prism_operator.plan.surprise import SurpriseState
from prism_operator.plan.types import DemandState, Observation, Reason, ServicePolicy

SHARES: Mapping[Reserve, tuple[float, float]] = {
    Reserve.QUALITY: (0.0, 0.5),
    Reserve.MIXED: (0.5, 1.0),
    Reserve.REPLICAS: (1.0, 1.5),
}
"""Share of the headroom held in replicas on the way up, and on the way down."""
LOWERED_SHARE = 0.5
"""Share of a class's tokens below its top from which on a hot pool is not one that only met a blip."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One tick's recommendation. Without one, `reason` and `message` say what is missing."""

    asked: Asked | None
    reason: Reason
    message: str
    held: bool = False
    """Whether the ready pods hold what presses now, with the classes at their floors where they may be sent there."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    nominal: Mapping[str, str] = field(default_factory=dict)
    """The points that were planned for; empty without a profile."""

    @property
    def up(self) -> int | None:
        return None if self.asked is None else self.asked.up

    @property
    def down(self) -> int | None:
        return None if self.asked is None else self.asked.down


def learn(
    forecasts: Mapping[str, ForecastState],
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    ready_s: float,
) -> dict[str, ForecastState]:
    """Forecasts after one more tick. A class whose rate is unknown learns nothing, and keeps what it knew."""
    if policy.effective.forecast is ForecastMethod.OFF:
        return {}
    horizon_s = float(policy.effective.forecast_horizon_s) or ready_s
    learnt = {}
    for class_policy in policy.classes:
        before = forecasts.get(class_policy.name, ForecastState())
        rate = demand.long_rate(state, class_policy.name, policy)
        if rate is not None:
            period_s = policy.loop.slow_period_s
            before = forecast.update(before, observation.now_s, rate.per_s, horizon_s, period_s)
        learnt[class_policy.name] = before
    return learnt


def surprised(
    surprises: Mapping[str, SurpriseState],
    forecasts: Mapping[str, ForecastState],
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    ready_s: float,
) -> dict[str, SurpriseState]:
    """Surprises after one more tick. Before the long window is full nothing was expected, so nothing can surprise."""
    now_s, loop = observation.now_s, policy.loop
    if not policy.effective.headroom_learned or state.since_s is None or now_s - state.since_s < loop.long_window_s:
        return {}
    lead_s = loop.slow_period_s + policy.effective.stabilization_up_s + ready_s
    learnt = {}
    for class_policy in policy.classes:
        name = class_policy.name
        before = surprise.of(surprises, name)
        rate = demand.long_rate(state, name, policy)
        peak = demand.peak_rate(state, name, policy, loop.slow_period_s if before.at_s is None else now_s - before.at_s)
        if rate is not None and peak is not None:
            expected_per_s = max(rate.per_s, _forecast(forecasts.get(name), policy, ready_s))
            before = surprise.update(before, now_s, expected_per_s, peak.per_s, peak.arrivals, lead_s)
        learnt[name] = before
    return learnt


@dataclass(slots=True)
class _Loads:
    """The busy classes' loads in four readings.

    pressing  what must fit at once, if it has pressed throughout the short window
    risen     mean, noticed early: what an order is for
    mean      mean over the long window: what is kept
    burst     the mean, and as much more as may come before an order helps
    """

    pressing: list[ClassLoad] = field(default_factory=list)
    risen: list[ClassLoad] = field(default_factory=list)
    mean: list[ClassLoad] = field(default_factory=list)
    burst: list[ClassLoad] = field(default_factory=list)


def ask(
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    forecasts: Mapping[str, ForecastState],
    surprises: Mapping[str, SurpriseState],
    ready_s: float,
) -> Ask:
    """What the load asks for; with a profile by `need`, without one by the proportional law on saturation."""
    ready = observation.ready
    if not ready:
        return Ask(None, Reason.IN_FLIGHT, "no pod is ready yet, so there is no load to plan for")
    if blind.is_blind(observation):
        return Ask(None, Reason.SIGNALS_STALE, blind.said(observation))
    loads = _Loads()
    for class_policy in policy.classes:
        name = class_policy.name
        pressing, long = demand.lasting_rate(state, name, policy), demand.long_rate(state, name, policy)
        recent = demand.recent_rate(state, name, policy)
        if pressing is None or long is None or recent is None:
            return Ask(None, Reason.SIGNALS_STALE, f"the load of class '{name}' is unknown")
        if max(pressing.per_s, long.per_s) == 0:
            continue
        lengths = demand.mean_lengths(state, name)
        if lengths is None:
            text = f"no request of class '{name}' has finished yet, so the cost of one is unknown"
            return Ask(None, Reason.STABILIZING, text)
        ahead = _forecast(forecasts.get(name), policy, ready_s)
        expected = max(long.per_s, ahead)
        excess = surprise.reserve_per_s(surprise.of(surprises, name), class_policy.attainment_target)
        burst = expected + max(policy.effective.headroom * expected, excess)
        loads.pressing.append(ClassLoad(class_policy, pressing.per_s, lengths))
        loads.risen.append(ClassLoad(class_policy, max(recent.per_s, ahead), lengths))
        loads.mean.append(ClassLoad(class_policy, expected, lengths))
        loads.burst.append(ClassLoad(class_policy, burst, lengths))
    return _from_profile(observation, state, policy, loads) or _from_saturation(observation, state, policy)


def _forecast(state: ForecastState | None, policy: ServicePolicy, ready_s: float) -> float:
    """Rate expected when an order takes effect; 0 where nothing better than the rate now is known."""
    if state is None:
        return 0.0
    methods = {ForecastMethod.HOLT: Method.HOLT, ForecastMethod.HOLT_WINTERS: Method.SEASON}
    method = methods.get(policy.effective.forecast) or forecast.best(state)
    horizon_s = float(policy.effective.forecast_horizon_s) or ready_s
    return forecast.ahead(state, method, horizon_s, policy.loop.slow_period_s) or 0.0


def _from_profile(observation: Observation, state: DemandState, policy: ServicePolicy, loads: _Loads) -> Ask | None:
    if not loads.mean:
        return Ask(flat(0, 0), Reason.DEMAND, "no load in fresh reports", inputs={"offered_per_s": 0.0})
    if observation.profile is None:
        return None
    profile = capacity.scaled(observation.profile, state.cost_factor)
    # What is uncertain about the profile keeps replicas and orders none: it would come and go with the evidence.
    cautious = capacity.scaled(observation.profile, calibration.cautious(state, policy.loop))
    steered = policy.budget is BudgetControl.AUTO
    floors = {one.name: one.floor if steered else policy.fixed_point or policy.max_point for one in policy.classes}
    nominal = _nominal(policy, floors, loads.mean, profile)
    top = capacity.replicas_for(loads.risen, nominal, profile)
    kept = capacity.replicas_for(loads.mean, nominal, profile)
    now = capacity.replicas_for(loads.pressing, floors, profile)
    burst = capacity.replicas_for(loads.burst, floors, profile)
    kept_burst = capacity.replicas_for(loads.burst, floors, cautious)
    if top is None or kept is None or now is None or burst is None or kept_burst is None:
        return None
    headroom = policy.effective.headroom
    up_share, down_share = SHARES[policy.effective.reserve]
    risen, lasting = (1 + up_share * headroom) * top, (1 + down_share * headroom) * kept
    hot = _hot_at_lowered_points(observation, state, policy)
    more = len(observation.ready) + 1 if hot is not None else 0
    offered = sum(load.per_s for load in loads.risen)
    asked = Asked(
        up=max(whole(risen), whole(now), whole(burst), more),
        at_once=max(whole(risen / (1 + TOLERANCE)), whole(now), whole(burst), more),
        nominal=risen,
        kept=lasting,
        burst=kept_burst,
        least=more,
    )
    points = sorted(set(nominal.values()), key=policy.ladder.index)
    text = (
        f"offered {offered:.2f}/s needs {top:.2f} replicas at '{', '.join(points)}', plus headroom {headroom:.2f}; "
        f"at the floors {now:.2f} hold what presses now, {burst:.2f} what may come before an order helps"
    )
    if hot is not None:
        text += f"; '{hot}' is hot at lowered points, which the profile does not explain: one pod more"
    inputs = {
        "offered_per_s": offered,
        "expected_per_s": sum(load.per_s for load in loads.mean),
        "pressing_per_s": sum(load.per_s for load in loads.pressing),
        "need_nominal": top,
        "need_kept": kept,
        "need_floors": now,
        "need_burst": burst,
        "headroom": headroom,
    }
    return Ask(
        asked=asked if steered else flat(asked.up, asked.down),
        reason=Reason.DEMAND,
        message=text,
        held=whole(now) <= len(observation.ready),
        inputs=inputs,
        nominal=nominal,
    )


def _hot_at_lowered_points(observation: Observation, state: DemandState, policy: ServicePolicy) -> str | None:
    """A class that made most of the long window's tokens below its top, and was hot; None if there is none, or if a pod
    became ready in the window."""
    loop = policy.loop
    if policy.budget is not BudgetControl.AUTO or observation.settled_s <= loop.long_window_s:
        return None
    for class_policy in policy.classes:
        seen = demand.window(state, class_policy.name, loop.long_window_s)
        lowered = sum(count for point, count in seen.tokens_by_point.items() if point != policy.max_point)
        if lowered <= LOWERED_SHARE * sum(seen.tokens_by_point.values()):
            continue
        saturation = demand.saturation(seen, class_policy)
        if saturation is not None and saturation > loop.high:
            return class_policy.name
    return None


def _nominal(
    policy: ServicePolicy, floors: Mapping[str, str], mean: list[ClassLoad], profile: Profile
) -> dict[str, str]:
    """The points to plan for: the tops, or the highest whose count the cost target pays for, or the floors."""
    ladder, target = policy.ladder, policy.target_replicas
    points = dict.fromkeys(floors, policy.max_point)
    if target is None or policy.budget is not BudgetControl.AUTO:
        return points
    reserve = 1 + SHARES[policy.effective.reserve][0] * policy.effective.headroom
    for position in range(ladder.index(policy.max_point), -1, -1):
        name = ladder.points[position].name
        points = {one: ladder.clamp(name, floor, policy.max_point) for one, floor in floors.items()}
        need = capacity.replicas_for(mean, points, profile)
        if need is None or whole(reserve * need) <= target:
            break
    return points


def _from_saturation(observation: Observation, state: DemandState, policy: ServicePolicy) -> Ask:
    """Without a profile: proportional law on measured saturation, with credit for pods that start.

    Source: the KEDA law of the llm-d workload autoscaling guide; n provisioned, c = ready/n, target 0.55, band to 0.40.
    """
    ready = len(observation.ready)
    provisioned = max(ready, observation.ordered_replicas or ready)
    worst: float | None = None
    for class_policy in policy.classes:
        seen = demand.window(state, class_policy.name, policy.loop.long_window_s)
        saturation = demand.saturation(seen, class_policy)
        if saturation is not None:
            worst = max(worst or 0.0, min(policy.loop.clamp, saturation))
    if worst is None:
        return Ask(None, Reason.NO_PROFILE, "no profile, and no request finished in the long window")
    credited = worst * ready / provisioned
    target, low = policy.loop.target_saturation, policy.loop.low
    if worst > target:
        asked = provisioned + max(0, math.ceil(provisioned * (credited / target - 1)))
    elif worst < low:
        asked = max(1, provisioned - math.floor(provisioned * (1 - worst / low)))
    else:
        asked = provisioned
    text = f"no profile; saturation {worst:.2f} against a target of {target:.2f} on {ready} of {provisioned} replicas"
    inputs = {"saturation": worst, "ready": float(ready), "provisioned": float(provisioned)}
    return Ask(flat(asked, asked), Reason.NO_PROFILE, text, inputs=inputs)
