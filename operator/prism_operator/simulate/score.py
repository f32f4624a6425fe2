"""One run as numbers. Definitions stand beside the fields; shares are 0 to 1, NaN never occurs: unknown is None."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prism_operator.simulate.control import Prism
from prism_operator.simulate.fleet import Fleet

POINT_FLAP_S, REPLICA_FLAP_S = 60.0, 600.0


@dataclass(frozen=True, slots=True)
class Score:
    """What one policy did with one workload in one world."""

    policy: str
    seed: int
    seconds: float
    requests: int
    """Offered: answered, shed and lost."""
    attainment: float
    """Share of offered requests that met every objective of their class."""
    attainment_by_class: dict[str, float]
    goodput_per_s: float
    """Requests met, a second."""
    shed: int
    lost: int
    """Accepted and lost with a pod."""
    ttft_s: tuple[float | None, ...]
    """Quantiles 0.5, 0.95 and 0.99 of answered requests."""
    tpot_s: tuple[float | None, ...]
    replica_hours: float
    """Of all pods that existed, starting and draining included: what is paid for."""
    mean_replicas: float
    """Time-averaged replicas of the Deployment; draining pods not counted (kube_deployment_status_replicas)."""
    peak_replicas: int
    cost: float | None
    """Replica-hours times the pool's price; None without one."""
    relative_quality: float | None
    """Mean over output tokens; None without any."""
    effective_accuracy: float
    """Mean over offered requests of relative quality if met, else 0 ("Model-Switching", HotCloud 2020)."""
    quality_lost: float
    """Sum over answered requests of 1 - relative quality: the integral of (1 - q) times the rate, in requests."""
    floor_violations: int
    """Answered requests whose quality is below that of their class's floor point."""
    seconds_at_floor: float
    """With any class at its floor below its top."""
    switches: int
    """Changes of a class's ordered point."""
    point_flaps: int
    """Changes of direction within 60 s."""
    replica_changes: int
    replica_flaps: int
    """Changes of direction within 10 minutes."""
    peak_backlog: int
    preemptions: int
    decisions: dict[str, int]
    """Prism's plans by reason; empty for other policies."""


def score(fleet: Fleet, policy: str, seed: int) -> Score:
    """Of a fleet whose run has ended; requests in flight count as missed."""
    finished = fleet.finished
    met = [fleet.is_met(request) for request in finished]
    lost = sum(fleet.lost.broken.values()) + fleet.outstanding
    offered = len(finished) + fleet.shed + lost
    tokens = sum(request.produced for request in finished)
    ladder = fleet.policy.ladder
    floors = {one.name: float(ladder[one.floor].relative_quality) for one in fleet.policy.classes}
    effective = sum(request.quality / request.produced for request, kept in zip(finished, met, strict=True) if kept)
    violations = sum(request.quality / request.produced < floors[request.service_class] - 1e-9 for request in finished)
    points = [[(sample.at_s, ladder.index(sample.points[n])) for sample in fleet.samples] for n in range(len(floors))]
    moves = [changes(series) for series in points]
    replicas = changes([(sample.at_s, sample.provisioned) for sample in fleet.samples])
    seconds = fleet.now_s
    hours = fleet.pod_seconds / 3600
    price = fleet.policy.price_per_hour
    decisions: dict[str, int] = {}
    if isinstance(fleet.controller, Prism):
        for tick in fleet.controller.ticks:
            for plan in (tick.plan, tick.replica_plan):
                if plan is not None:
                    decisions[plan.reason.value] = decisions.get(plan.reason.value, 0) + 1
    return Score(
        policy=policy,
        seed=seed,
        seconds=seconds,
        requests=offered,
        attainment=sum(met) / offered if offered else 1.0,
        attainment_by_class=_by_class(fleet, met),
        goodput_per_s=sum(met) / seconds if seconds else 0.0,
        shed=fleet.shed,
        lost=lost,
        ttft_s=quantiles([request.ttft_s for request in finished]),
        tpot_s=quantiles([tpot for request in finished if (tpot := request.tpot_s) is not None]),
        replica_hours=hours,
        mean_replicas=sum(sample.provisioned for sample in fleet.samples) / max(1, len(fleet.samples)),
        peak_replicas=max((sample.existing for sample in fleet.samples), default=0),
        cost=None if price is None else hours * float(price),
        relative_quality=sum(request.quality for request in finished) / tokens if tokens else None,
        effective_accuracy=effective / offered if offered else 1.0,
        quality_lost=sum(1 - request.quality / request.produced for request in finished),
        floor_violations=violations,
        seconds_at_floor=_seconds_at_floor(fleet),
        switches=sum(len(one) for one in moves),
        point_flaps=sum(flaps(one, POINT_FLAP_S) for one in moves),
        replica_changes=len(replicas),
        replica_flaps=flaps(replicas, REPLICA_FLAP_S),
        peak_backlog=max((sample.backlog for sample in fleet.samples), default=0),
        preemptions=fleet.preemptions + sum(pod.preemptions for pod in fleet.pods),
        decisions=dict(sorted(decisions.items())),
    )


def quantiles(values: Sequence[float], shares: Sequence[float] = (0.5, 0.95, 0.99)) -> tuple[float | None, ...]:
    """Nearest-rank quantiles; None without values."""
    ordered = sorted(values)
    return tuple(ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None for share in shares)


def changes(series: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(time, difference) wherever a series of (time, value) changes."""
    return [(at_s, after - before) for (_, before), (at_s, after) in pairwise(series) if after != before]


def flaps(moves: Sequence[tuple[float, int]], within_s: float) -> int:
    """Moves that turn the direction of the one before, no later than `within_s` after it."""
    return sum(
        later * earlier < 0 and at_s - before_s <= within_s for (before_s, earlier), (at_s, later) in pairwise(moves)
    )


def _by_class(fleet: Fleet, met: Sequence[bool]) -> dict[str, float]:
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for request, good in zip(fleet.finished, met, strict=True):
        name = request.service_class
        total[name] = total.get(name, 0) + 1
        kept[name] = kept.get(name, 0) + good
    for missing in (fleet.lost.shed, fleet.lost.broken):
        for name, count in missing.items():
            total[name] = total.get(name, 0) + count
    return {name: kept.get(name, 0) / count for name, count in sorted(total.items())}


def _seconds_at_floor(fleet: Fleet) -> float:
    floors = [(one.floor, fleet.policy.max_point) for one in fleet.policy.classes]
    low = [
        any(point == floor != top for point, (floor, top) in zip(sample.points, floors, strict=True))
        for sample in fleet.samples
    ]
    return sum(
        later.at_s - earlier.at_s for (earlier, later), at in zip(pairwise(fleet.samples), low, strict=False) if at
    )
