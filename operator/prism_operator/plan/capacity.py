"""From a profile to the request rate that one replica sustains within the objectives: closed forms, no simulation.

With mean prompt I, mean output O and rate lam on one replica, Little's law gives B = lam * O * tau sequences decoding,
where tau is the time per output token. A step takes tau = a + c*B + d*B*k + lam*tau*(e + g*I), linear in tau:

    k   = (E[IO] + E[O^2]/2) / O      mean context of a running sequence (length-biased)
    w   = e + g*I + O*(c + d*k)       busy seconds that one more request costs
    tau = a / (1 - lam*w)             stable iff lam < 1/w

Each limit below solves this for the largest lam; the least of them is the capacity, and its name is reported.
a, c, d, e, g are the five costs of `prism_api.profile.PointProfile` in seconds (d per token of context).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prism_api.profile import PointProfile, Profile
from prism_operator.plan.types import ClassPolicy, Lengths

TPOT_QUANTILE_RATIO = 1.3
"""Quantile of a request's TPOT over its mean at usual attainment targets; simulated p95 ratios lie in 1.1 to 1.4."""
KV_USABLE = 0.9
"""Share of the KV cache that may fill before preemption sets in."""
ARRIVAL_CV_SQUARED = 1.0
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests a second of one replica, and the limit that binds: tpot, sequences, prefill, kv or ttft."""

    per_s: float
    binding: str


@dataclass(frozen=True, slots=True)
class _Costs:
    a: float
    c: float
    d: float
    e: float
    g: float

    def busy_s(self, lengths: Lengths) -> float:
        prefill = self.e + self.g * lengths.prompt_tokens
        return prefill + lengths.output_tokens * (self.c + self.d * lengths.context_tokens)

    def tau_s(self, rate_per_s: float, lengths: Lengths) -> float:
        slack = 1 - rate_per_s * self.busy_s(lengths)
        return self.a / slack if slack > 0 else math.inf


def _costs(point: PointProfile, base_nanoseconds: int | None = None) -> _Costs:
    """Costs in seconds; `base_nanoseconds` takes the place of the point's own base."""
    return _Costs(
        a=(point.step_base_nanoseconds if base_nanoseconds is None else base_nanoseconds) * 1e-9,
        c=point.step_per_sequence_nanoseconds * 1e-9,
        d=point.step_per_kilotoken_nanoseconds * 1e-12,
        e=point.prefill_base_nanoseconds * 1e-9,
        g=point.prefill_per_token_nanoseconds * 1e-9,
    )


def sustainable_rate(point: PointProfile, limits: Profile, policy: ClassPolicy, lengths: Lengths) -> Capacity:
    """Largest rate of one replica that keeps the class's objectives at its attainment target.

    `point` is the cost of the operating point, `limits` the engine's limits of the same profile. The point's fit error
    is taken off. Zero if an objective is out of reach even for a lone request.
    """
    return _sustainable(_costs(point), point.fit_error_permille, limits, policy, lengths)


def _sustainable(
    costs: _Costs, fit_error_permille: int, limits: Profile, policy: ClassPolicy, lengths: Lengths
) -> Capacity:
    busy_s = costs.busy_s(lengths)
    a, outputs = costs.a, lengths.output_tokens
    batch, chunk = limits.max_sequences, limits.prefill_tokens_per_step
    kv_tokens = KV_USABLE * limits.kv_tokens
    rates = {
        "sequences": batch / (outputs * a + batch * busy_s),
        "prefill": chunk / (lengths.prompt_tokens * a + chunk * busy_s),
        "kv": kv_tokens / (outputs * a * lengths.context_tokens + kv_tokens * busy_s),
    }
    if policy.tpot_s is not None:
        rates["tpot"] = (1 - TPOT_QUANTILE_RATIO * a / policy.tpot_s) / busy_s
    ceiling = min(rates.values())
    if policy.ttft_s is not None and ceiling > 0:
        rates["ttft"] = _ttft_rate(costs, chunk, policy.ttft_s, policy.attainment_target, lengths, ceiling)
    binding = min(rates, key=lambda name: (rates[name], name))
    honest = 1 - min(fit_error_permille, 1000) / 1000
    return Capacity(max(0.0, rates[binding]) * honest, binding)


def _ttft_rate(
    costs: _Costs, chunk: int, ttft_s: float, quantile: float, lengths: Lengths, ceiling_per_s: float
) -> float:
    """Largest rate up to `ceiling_per_s` whose waiting plus prefill keeps the TTFT objective, by bisection.

    Waiting by Kingman's formula for the queue in front of prefill, with an exponential tail at the quantile.
    """

    def ttft(rate_per_s: float) -> float:
        tau = costs.tau_s(rate_per_s, lengths)
        prefill = costs.e + costs.g * lengths.prompt_tokens
        service = max(prefill, lengths.prompt_tokens * tau / chunk)
        utilisation = rate_per_s * service
        if utilisation >= 1:
            return math.inf
        wait = utilisation / (1 - utilisation) * (ARRIVAL_CV_SQUARED + lengths.prompt_cv_squared) / 2 * service
        tail = wait * max(0.0, -math.log(1 - quantile))
        return tail + prefill + math.ceil(lengths.prompt_tokens / chunk) * tau

    if ttft(ceiling_per_s) <= ttft_s:
        return ceiling_per_s
    low, high = 0.0, ceiling_per_s
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if ttft(middle) <= ttft_s:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class ClassLoad:
    """Offered load of one class on the pool."""

    policy: ClassPolicy
    per_s: float
    lengths: Lengths


_COST_FIELDS = tuple(name for name in PointProfile.model_fields if name.endswith("_nanoseconds"))


def scaled(profile: Profile, factor: float) -> Profile:
    """The profile with every cost multiplied by `factor`; limits stay."""
    if factor == 1.0:
        return profile
    points = {}
    for name, point in profile.points.items():
        costs = {field: round(getattr(point, field) * factor) for field in _COST_FIELDS}
        points[name] = point.model_copy(update=costs)
    return profile.model_copy(update={"points": points})


def replicas_for(loads: Iterable[ClassLoad], points: Mapping[str, str], profile: Profile) -> float | None:
    """Replicas, as a real number, that hold `loads` with every class at its point; None if a point has no profile.

    Each class's share lam/C adds up: one linear inequality per service. See `_shared` for what classes share.
    """
    busy = [load for load in loads if load.per_s > 0]
    own = _shared(busy, points, profile)
    if own is None:
        return None
    total = 0.0
    for load, costs in zip(busy, own, strict=True):
        fit_error = profile.points[points[load.policy.name]].fit_error_permille
        rate = _sustainable(costs, fit_error, profile, load.policy, load.lengths).per_s
        total += load.per_s / rate if rate > 0 else math.inf
    return total


def time_per_token_s(
    loads: Iterable[ClassLoad], points: Mapping[str, str], profile: Profile, replicas: int
) -> float | None:
    """Mean time per output token with `loads` spread over `replicas`: infinite beyond capacity, None if unknown."""
    busy = [load for load in loads if load.per_s > 0]
    own = _shared(busy, points, profile)
    if own is None or not busy or replicas < 1:
        return None
    utilisation = sum(load.per_s / replicas * cost.busy_s(load.lengths) for load, cost in zip(busy, own, strict=True))
    return own[0].a / (1 - utilisation) if utilisation < 1 else math.inf


def _shared(busy: list[ClassLoad], points: Mapping[str, str], profile: Profile) -> list[_Costs] | None:
    """Cost of each class in the batches they share: its own tokens at its own point, the base of the costliest one.

    Conservative, because a batch touches the union of its sequences' sub-experts.
    """
    own = [profile.points.get(points[load.policy.name]) for load in busy]
    known = [point for point in own if point is not None]
    if len(known) < len(own):
        return None
    base = max((point.step_base_nanoseconds for point in known), default=0)
    return [_costs(point, base) for point in known]
