"""How many replicas the load asks for, before any bound, window or step cap.

    up      max(ceil((1 + u*h) * need(nominal)), ceil((1 + h) * need(floors)))     of the peak load
    keep    ceil((1 + k*h) * need(nominal))         of the mean load, at the profile's costs plus their uncertainty

`need(points)` is the real number of replicas that hold a load with the classes at these points, h the headroom, and
(u, k) its shares by `scaling.reserve`: how much of it stands in idle pods. Nominal points are the tops: planned at the
floors, no reserve would be left. Only `cost.targetPerHour` lowers them, to the highest points whose count fits it.

The peak load of a class is the largest of its short rate, its long rate and its forecast at the time when an ordered
pod is ready; the mean load leaves the short rate out. k above u is the hysteresis of the N/(N-1) test.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_api.profile import Profile
from prism_api.service import BudgetControl, ForecastMethod, Reserve
from prism_operator.plan import capacity, demand, forecast
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.forecast import ForecastState, Method
from prism_operator.plan.types import DemandState, Observation, Reason, ServicePolicy

SHARES: Mapping[Reserve, tuple[float, float]] = {
    Reserve.QUALITY: (0.0, 0.5),
    Reserve.MIXED: (0.5, 1.0),
    Reserve.REPLICAS: (1.0, 1.5),
}
"""Share of the headroom held in replicas on the way up, and on the way down."""
_ROUNDING = 1e-9
"""Keeps a need of exactly n replicas from asking for n + 1."""
_BEYOND_ANY_BOUND = 1e6


@dataclass(frozen=True, slots=True)
class Ask:
    """One tick's recommendation. None: unknown, and then `reason` and `message` say what is missing."""

    up: int | None
    down: int | None
    reason: Reason
    message: str
    bridged: bool = False
    """Whether the ready pods hold the load once every class is at its floor, and may be sent there."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    nominal: Mapping[str, str] = field(default_factory=dict)
    """The points that were planned for; empty without a profile."""


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


def ask(
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    forecasts: Mapping[str, ForecastState],
    ready_s: float,
) -> Ask:
    """What the load asks for; with a profile by `need`, without one by the proportional law on saturation."""
    ready = observation.ready
    if not ready:
        return Ask(None, None, Reason.IN_FLIGHT, "no pod is ready yet, so there is no load to plan for")
    if len(observation.fresh) < len(ready) / 2:
        text = f"only {len(observation.fresh)} of {len(ready)} ready pods reported freshly"
        return Ask(None, None, Reason.SIGNALS_STALE, text)
    peak: list[ClassLoad] = []
    mean: list[ClassLoad] = []
    for class_policy in policy.classes:
        name = class_policy.name
        short, long = demand.short_rate(state, name, policy), demand.long_rate(state, name, policy)
        if short is None or long is None:
            return Ask(None, None, Reason.SIGNALS_STALE, f"the load of class '{name}' is unknown")
        if max(short.per_s, long.per_s) == 0:
            continue
        lengths = demand.mean_lengths(state, name)
        if lengths is None:
            text = f"no request of class '{name}' has finished yet, so the cost of one is unknown"
            return Ask(None, None, Reason.STABILIZING, text)
        expected = max(long.per_s, _forecast(forecasts.get(name), policy, ready_s))
        # Up follows the burst, for the up window takes the least ask; down follows the mean, for it takes the largest.
        peak.append(ClassLoad(class_policy, max(short.per_s, expected), lengths))
        mean.append(ClassLoad(class_policy, expected, lengths))
    return _from_profile(observation, state, policy, peak, mean) or _from_saturation(observation, state, policy)


def _forecast(state: ForecastState | None, policy: ServicePolicy, ready_s: float) -> float:
    """Rate expected when an order takes effect; 0 where nothing better than the rate now is known."""
    if state is None:
        return 0.0
    methods = {ForecastMethod.HOLT: Method.HOLT, ForecastMethod.HOLT_WINTERS: Method.SEASON}
    method = methods.get(policy.effective.forecast) or forecast.best(state)
    horizon_s = float(policy.effective.forecast_horizon_s) or ready_s
    return forecast.ahead(state, method, horizon_s, policy.loop.slow_period_s) or 0.0


def _from_profile(
    observation: Observation,
    state: DemandState,
    policy: ServicePolicy,
    peak: list[ClassLoad],
    mean: list[ClassLoad],
) -> Ask | None:
    if not peak:
        return Ask(0, 0, Reason.DEMAND, "no load in fresh reports", inputs={"offered_per_s": 0.0})
    if observation.profile is None:
        return None
    profile = capacity.scaled(observation.profile, state.cost_factor)
    # What is uncertain about the profile keeps replicas and orders none: it would come and go with the evidence.
    cautious = capacity.scaled(observation.profile, state.cautious_cost_factor)
    floors = {class_policy.name: class_policy.floor for class_policy in policy.classes}
    nominal = _nominal(policy, floors, mean, profile)
    top = capacity.replicas_for(peak, nominal, profile)
    bottom = capacity.replicas_for(peak, floors, profile)
    kept = capacity.replicas_for(mean, nominal, cautious)
    if top is None or bottom is None or kept is None:
        return None
    headroom = policy.effective.headroom
    up_share, down_share = SHARES[policy.effective.reserve]
    up = max(_ceil((1 + up_share * headroom) * top), _ceil((1 + headroom) * bottom))
    offered = sum(load.per_s for load in peak)
    points = sorted(set(nominal.values()), key=policy.ladder.index)
    text = (
        f"offered {offered:.2f}/s needs {top:.2f} replicas at '{', '.join(points)}' and {bottom:.2f} at the floors, "
        f"plus headroom {headroom:.2f}"
    )
    inputs = {
        "offered_per_s": offered,
        "expected_per_s": sum(load.per_s for load in mean),
        "need_nominal": top,
        "need_floors": bottom,
        "need_kept": kept,
        "headroom": headroom,
    }
    bridged = policy.budget is BudgetControl.AUTO and _ceil(bottom) <= len(observation.ready)
    return Ask(up, _ceil((1 + down_share * headroom) * kept), Reason.DEMAND, text, bridged, inputs, nominal)


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
        if need is None or _ceil(reserve * need) <= target:
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
        for histogram, objective_s in ((seen.ttft, class_policy.ttft_s), (seen.tpot, class_policy.tpot_s)):
            latency_s = demand.latency_quantile_s(histogram, class_policy.attainment_target)
            if latency_s is not None and objective_s is not None:
                worst = max(worst or 0.0, min(policy.loop.clamp, latency_s / objective_s))
    if worst is None:
        return Ask(None, None, Reason.NO_PROFILE, "no profile, and no request finished in the long window")
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
    return Ask(asked, asked, Reason.NO_PROFILE, text, inputs=inputs)


def _ceil(replicas: float) -> int:
    # An objective out of reach at any rate needs infinitely many: say "more than any bound" and let bounds cut.
    return math.ceil(min(replicas, _BEYOND_ANY_BOUND) - _ROUNDING)
