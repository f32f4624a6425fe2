"""CPU time of one tick of the planner over a whole fleet.

    python -m prism_operator.plan_bench                       1,000 services of 10 pods and 3 classes
    python -m prism_operator.plan_bench --services 250 1000   how it grows with services; --pods, --classes likewise

Every service is a world of its own: rates, lengths and profiles are drawn from one seed, and one tick in fifty carries
a burst of twice the rate, so that some services run below their tops. Counted is the process's CPU time in `plan/`
alone: demand, budget, and each slow tick's share of the replica plan and of the fleet's arbitration. Not counted:
polling pods, building observations, sending directives. The exit status is 1 above a millisecond a service.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prism_api.control import HISTOGRAM_BOUNDS_MS, Fence, Load, histogram_bucket
from prism_api.model import PrismModelSpec
from prism_api.profile import PointProfile, Profile
from prism_api.service import PrismServiceSpec
from prism_operator.plan import budget, demand, fleet, replicas
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.fleet import Caps, Claim
from prism_operator.plan.policy import resolve
from prism_operator.plan.types import (
    BudgetState,
    ClassDelta,
    DemandState,
    Observation,
    PodView,
    ReplicaState,
    ServicePolicy,
)

SEED = 42
LADDER = {"b500": 500, "b625": 625, "b750": 750, "b875": 875, "full": 1000}
WARM_UP_TICKS, MEASURED_TICKS = 75, 30
"""The long window is full after a minute; a slow period is 30 ticks, so each service decides its replicas once."""
FLEET_PERIOD_TICKS = 60
LIMIT_S = 0.001
"""Most CPU seconds a service of at most 10 pods and 3 classes may take; four runs of 100 to 1,000 services took
0.57 to 0.67 ms on two shared cores."""
LIMITED_FROM = 100
"""Services from which the limit is checked; below it the clock's own cost shows."""
DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True, slots=True)
class Tick:
    """CPU seconds that one tick of the fleet takes, by part."""

    services: int
    pods: int
    classes: int
    demand_s: float
    budget_s: float
    replicas_s: float
    """A slow tick of every service, divided by the ticks between two of them."""
    fleet_s: float
    """The arbitration, likewise."""

    @property
    def total_s(self) -> float:
        return self.demand_s + self.budget_s + self.replicas_s + self.fleet_s


class _Service:
    """One service's load and memory. Its pods report what the plan told them the tick before."""

    def __init__(self, rng: random.Random, pods: int, classes: int) -> None:
        self._rng = rng
        self.policy = _policy(rng, classes)
        self._names = [one.name for one in self.policy.classes]
        per_pod = rng.uniform(0.8, 2.0)
        self._rates = {name: per_pod * pods * rng.uniform(0.5, 1.5) / classes for name in self._names}
        self._lengths = {name: (rng.randint(40, 90), rng.randint(20, 50)) for name in self._names}
        profile = _profile(rng)
        self._pods = [_pod(number, self._names, profile) for number in range(pods)]
        self.demand, self.budget, self.replicas = DemandState(), BudgetState(), ReplicaState()

    def observe(self, now_s: float) -> Observation:
        points = {name: one.point for name, one in self.budget.classes.items()}
        burst = 2.0 if self._rng.random() < 0.02 else 1.0
        return Observation(
            now_s=now_s,
            pods=tuple(replace(pod, points=points or pod.points) for pod in self._pods),
            classes={name: self._delta(name, burst, points.get(name, "full")) for name in self._names},
            ordered_replicas=len(self._pods),
            pod_ready_times_s=(90.0, 110.0, 100.0),
        )

    def _delta(self, name: str, burst: float, point: str) -> ClassDelta:
        mean = self._rates[name] * burst
        arrived = max(0, round(self._rng.gauss(mean, mean**0.5)))
        prompt, output = self._lengths[name]
        cells = [0] * 16
        cells[0] = arrived
        return ClassDelta(
            arrived=arrived,
            finished=arrived,
            met=arrived,
            prompt_tokens=prompt * arrived,
            output_tokens=output * arrived,
            ttft=_histogram(self._rng.uniform(50, 400), arrived),
            tpot=_histogram(self._rng.uniform(30, 90), arrived),
            tokens_by_point={point: output * arrived},
            in_out=tuple(cells),
        )

    def claim(self, name: str) -> Claim | None:
        profile = self._pods[0].profile
        assert profile is not None, "every pod of the bench has one"
        loads = []
        for one in self.policy.classes:
            lengths = demand.mean_lengths(self.demand, one.name)
            if lengths is not None:
                loads.append(ClassLoad(one, self._rates[one.name], lengths))
        return fleet.claim(name, self.policy, loads, profile, accelerators=1)


def measure(services: int = 1000, pods: int = 10, classes: int = 3, seed: int = SEED) -> Tick:
    """CPU time of one tick, averaged over `MEASURED_TICKS` after a warm-up."""
    rng = random.Random(seed)
    world = [_Service(random.Random(rng.random()), pods, classes) for _ in range(services)]
    spent = dict.fromkeys(("demand", "budget", "replicas"), 0.0)
    for tick in range(WARM_UP_TICKS + MEASURED_TICKS):
        seen = [service.observe(float(tick)) for service in world]
        # The clock is read once for all services: a reading costs more than some of what it would measure.
        marks = [time.process_time()]
        for service, one in zip(world, seen, strict=True):
            service.demand = demand.update(service.demand, one, service.policy)
        marks.append(time.process_time())
        for service, one in zip(world, seen, strict=True):
            _, service.budget = budget.decide(one, service.demand, service.policy, service.budget)
        marks.append(time.process_time())
        for number, (service, one) in enumerate(zip(world, seen, strict=True)):
            if tick % MEASURED_TICKS == number % MEASURED_TICKS:
                _, service.replicas = replicas.decide(one, service.demand, service.policy, service.replicas)
        marks.append(time.process_time())
        if tick >= WARM_UP_TICKS:
            for part, (start, end) in zip(spent, itertools.pairwise(marks), strict=True):
                spent[part] += end - start
    return Tick(
        services=services,
        pods=pods,
        classes=classes,
        demand_s=spent["demand"] / MEASURED_TICKS,
        budget_s=spent["budget"] / MEASURED_TICKS,
        replicas_s=spent["replicas"] / MEASURED_TICKS,
        fleet_s=_arbitration_s(world) / FLEET_PERIOD_TICKS,
    )


def _arbitration_s(world: Sequence[_Service]) -> float:
    start = time.process_time()
    claims = [claim for number, one in enumerate(world) if (claim := one.claim(f"s{number}")) is not None]
    needed = sum(fleet.hull(claim)[0].replicas for claim in claims)
    fleet.arbitrate(claims, Caps(accelerators=round(1.1 * needed)))
    return time.process_time() - start


def _policy(rng: random.Random, classes: int) -> ServicePolicy:
    spec = PrismServiceSpec.model_validate(
        {
            "modelRef": {"name": "bench"},
            "defaultClass": "class-0",
            "classes": [
                {
                    "name": f"class-{number}",
                    "priority": number,
                    "objectives": {"ttftMilliseconds": 1500, "tpotMilliseconds": rng.randint(150, 250)},
                    "quality": {"minRelativeQuality": "0.90", "maxDegradedSecondsPerDay": 36_000},
                }
                for number in range(classes)
            ],
            "scaling": {"minReplicas": 1, "maxReplicas": 1000},
            "pools": [{"name": "main", "accelerator": {"name": "gpu"}, "pricePerHour": "2.50"}],
            "runtime": {"image": "registry.example/runtime@sha256:0"},
        }
    )
    points = [
        {
            "name": name,
            "budgetPermille": permille,
            "policy": "prefix",
            "relativeQuality": f"{0.8 + 0.0002 * permille:.4f}",
            "relativeQualityLow": f"{0.8 + 0.0002 * permille:.4f}",
        }
        for name, permille in LADDER.items()
    ]
    model = PrismModelSpec.model_validate(
        {
            "source": {"image": {"reference": "registry.example/model@sha256:0"}},
            "digest": DIGEST,
            "servedName": "bench",
            "operatingPoints": points,
        }
    )
    resolved = resolve(spec, model)
    assert isinstance(resolved, ServicePolicy), str(resolved)
    return resolved


def _profile(rng: random.Random) -> Profile:
    speed = rng.uniform(0.8, 1.2)
    points = {}
    for name, permille in LADDER.items():
        share = speed * (0.25 + 0.75 * permille / 1000)
        points[name] = PointProfile(
            step_base_nanoseconds=round(30_000_000 * share),
            step_per_sequence_nanoseconds=round(3_000_000 * share),
            step_per_kilotoken_nanoseconds=round(100_000 * share),
            prefill_base_nanoseconds=round(1_000_000 * share),
            prefill_per_token_nanoseconds=round(350_000 * share),
        )
    return Profile(
        accelerator="gpu",
        provenance="made up for the bench",
        max_sequences=32,
        kv_tokens=65_536,
        prefill_tokens_per_step=256,
        points=points,
    )


def _pod(number: int, names: Sequence[str], profile: Profile) -> PodView:
    return PodView(
        name=f"pod-{number}",
        uid=f"uid-{number}",
        created_s=-1000.0,
        ready=True,
        ready_s=-900.0,
        held=Fence(epoch=1, sequence=1),
        points=dict.fromkeys(names, "full"),
        load=Load(running=4, waiting=0, kv_blocks=1024, kv_blocks_used=100, preemptions=0),
        profile=profile,
    )


def _histogram(milliseconds: float, count: int) -> tuple[int, ...]:
    counts = [0] * len(HISTOGRAM_BOUNDS_MS)
    counts[histogram_bucket(milliseconds)] = count
    return tuple(counts)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if a tick took longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, nargs="+", default=[1000])
    parser.add_argument("--pods", type=int, nargs="+", default=[10])
    parser.add_argument("--classes", type=int, nargs="+", default=[3])
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    options = parser.parse_args(argv)
    if not options.json:
        print("services  pods  classes   demand   budget  replicas   fleet    total  (CPU seconds a tick)")
    slow = 0
    for services, pods, classes in itertools.product(options.services, options.pods, options.classes):
        tick = measure(services, pods, classes)
        limited = services >= LIMITED_FROM and pods <= 10 and classes <= 3
        slow += limited and tick.total_s > LIMIT_S * services
        if options.json:
            figures = {name: getattr(tick, name) for name in Tick.__slots__} | {"total_s": tick.total_s}
            print(json.dumps(figures))
        else:
            parts = (tick.demand_s, tick.budget_s, tick.replicas_s, tick.fleet_s, tick.total_s)
            print(f"{services:8}  {pods:4}  {classes:7}  " + "  ".join(f"{part:7.3f}" for part in parts))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
