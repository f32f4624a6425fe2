"""Every state of a small service, and every way from it: the replica plan arrives, and breaks nothing on the way.

Enumerated: replicas ordered (1 to 5), how many of them are ready, a pod that never starts or none, seven loads, six
specs. Each is run to the end with pods that become ready one a tick.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from prism_operator.plan import replicas
from prism_operator.plan.types import DemandState, LoopSettings, PodView, ReplicaPlan, ReplicaState, Status
from tests.unit.plan.factories import demand_of, observation, pod, service_policy, starting_pod

TICK_S = 30.0
LOADS = (0, 3, 5, 6, 11, 17, 40)
MOST = 5
LOOP = LoopSettings(down_period_s=TICK_S, pod_ready_s=2 * TICK_S)
WINDOWS = {"scaleUp": {"stabilizationWindowSeconds": 30}, "scaleDown": {"stabilizationWindowSeconds": 60}}
SPECS: dict[str, dict[str, Any]] = {
    "wide": {},
    "one at a time": {"maxStep": 1},
    "narrow": {"minReplicas": 2, "maxReplicas": 3},
    "reserve in quality": {"reserve": "Quality"},
    "reserve in replicas": {"reserve": "Replicas", "headroom": "0.5"},
    "may sleep": {"minReplicas": 0, "idle": {"scaleToZero": "Enabled", "afterSeconds": 60}},
}
LONGEST = 40
"""Ticks until a run must have arrived: a window, then one pod a tick down, or starts and windows up."""


@dataclass(frozen=True, slots=True)
class Step:
    at_s: float
    before: int
    plan: ReplicaPlan


@pytest.fixture(scope="module")
def loads() -> dict[int, DemandState]:
    return {load: replace(demand_of(service_policy(), load, 0.0), since_s=-1000.0) for load in LOADS}


def _pods(ordered: int, ready: int, stuck: bool, now_s: float) -> tuple[PodView, ...]:
    views = [pod(f"pod-{n}") for n in range(ready)]
    for number in range(ready, ordered):
        never = stuck and number == ordered - 1
        views.append(starting_pod(f"pod-{number}", -1000.0 if never else now_s - 1.0))
    return tuple(views)


def _run(scaling: dict[str, Any], history: DemandState, ordered: int, ready: int, stuck: bool) -> Iterator[Step]:
    """Ticks until nothing has changed for longer than every window."""
    fields = {"minReplicas": 1, "maxReplicas": MOST, "behavior": WINDOWS, **scaling}
    policy, state, quiet = service_policy(LOOP, scaling=fields), ReplicaState(since_s=-1000.0), 0
    for tick in range(LONGEST):
        now_s = tick * TICK_S
        seen = observation(now_s, _pods(ordered, ready, stuck, now_s), ordered_replicas=ordered)
        plan, state = replicas.decide(seen, history, policy, state)
        yield Step(now_s, ordered, plan)
        quiet = 0 if plan.replicas != ordered else quiet + 1
        if quiet > 6:
            return
        stuck = stuck and plan.replicas >= ordered  # a ReplicaSet removes pods that are not ready first
        ordered = plan.replicas
        ready = min(ready + 1, max(0, ordered - stuck)) if ready < ordered else ordered
    raise AssertionError(f"not settled after {LONGEST} ticks at {ordered} replicas: {plan}")


@pytest.mark.parametrize("name", SPECS)
def test_every_state_arrives_in_one_direction_within_bounds_and_says_why(
    name: str, loads: dict[int, DemandState]
) -> None:
    scaling = SPECS[name]
    most, least = scaling.get("maxReplicas", MOST), scaling.get("minReplicas", 1)
    step = scaling.get("maxStep", 4)
    for load, ordered in itertools.product(LOADS, range(1, MOST + 1)):
        ends = set()
        for ready, stuck in itertools.product(range(ordered + 1), (False, True)):
            if stuck and ready == ordered:
                continue
            where = f"{name}: {load}/s, {ready} of {ordered} ready{', one never' if stuck else ''}"
            counts = [ordered]
            for taken in _run(scaling, loads[load], ordered, ready, stuck):
                plan = taken.plan
                assert plan.message, where
                assert least <= plan.replicas <= most, f"{where}: {plan}"
                inside = least <= taken.before <= most
                assert not inside or -1 <= plan.replicas - taken.before <= step, f"{where}: {plan}"
                assert (plan.status is Status.PROGRESS) == (plan.replicas != taken.before), f"{where}: {plan}"
                counts.append(plan.replicas)
            moves = [b - a for a, b in itertools.pairwise(counts) if b != a]
            assert all(move > 0 for move in moves) or all(move < 0 for move in moves), f"{where}: {counts}"
            if not (stuck and ready == 0 and ordered == 1):
                ends.add(counts[-1])
        assert max(ends) - min(ends) <= 1, f"{name}: {load}/s from {ordered}: {ends}"


@pytest.mark.parametrize("name", SPECS)
def test_every_state_ends_where_the_load_is_held_or_a_bound_is_named(name: str, loads: dict[int, DemandState]) -> None:
    for load, ordered in itertools.product(LOADS, range(1, MOST + 1)):
        *_, last = _run(SPECS[name], loads[load], ordered, ordered, stuck=False)
        plan = last.plan
        assert plan.replicas >= plan.recommended or plan.limited_by is not None, f"{name}: {load}/s: {plan}"
        assert plan.status is not Status.PROGRESS
