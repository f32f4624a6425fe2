"""A step of load on a simulated fleet: the budget bridges until replicas arrive, and quality comes back."""

from typing import Any

import pytest

from prism_operator.plan.surprise import REMEMBERED
from prism_operator.plan.types import LoopSettings, Reason, ServicePolicy, Status
from tests.sim.fleet import Fleet, poisson
from tests.unit.plan.factories import POINTS, profile, service_class, service_policy

SEEDS = (3, 5, 8)
STEP_S = 60.0
CALM, BURST = 3.0, 8.0
LADDER = list(POINTS)
BEHAVIOR = {"scaleUp": {"stabilizationWindowSeconds": 5}, "scaleDown": {"stabilizationWindowSeconds": 60}}


def _policy(**changes: Any) -> ServicePolicy:
    """Time compressed: pods start within 15 s, so the slow loop runs every 5 s and its windows shrink alike.

    The headroom is set, so that nothing is kept for the next burst.
    """
    scaling = {
        "minReplicas": 1,
        "maxReplicas": 3,
        "headroom": "0.10",
        "behavior": BEHAVIOR,
    }
    return service_policy(LoopSettings(slow_period_s=5.0, pod_ready_s=15.0), **{"scaling": scaling, **changes})


def _burst(seed: int, policy: ServicePolicy, seconds: float = 260.0) -> Fleet:
    fleet = Fleet(policy, profile())
    fleet.run(poisson(seed, [(STEP_S, CALM), (45.0, BURST), (seconds - STEP_S - 45.0, CALM)]), seconds)
    return fleet


@pytest.fixture(scope="module")
def bursts() -> dict[int, Fleet]:
    return {seed: _burst(seed, _policy()) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_budget_falls_within_five_seconds_of_a_step(bursts: dict[int, Fleet], seed: int) -> None:
    lower = [at_s for at_s, point in bursts[seed].points() if at_s >= STEP_S and point != "full"]
    assert lower, "the budget never fell"
    assert lower[0] - STEP_S <= 5.0


@pytest.mark.parametrize("seed", SEEDS)
def test_budget_falls_before_the_ordered_replica_is_ready(bursts: dict[int, Fleet], seed: int) -> None:
    ticks = bursts[seed].ticks
    ordered_s = next(tick.at_s for tick in ticks if tick.ordered > 1)
    ready_s = next(tick.at_s for tick in ticks if tick.ready > 1)
    lower_s = next(at_s for at_s, point in bursts[seed].points() if point != "full")
    assert lower_s < ready_s
    assert any(t.plan.reason is Reason.BURST_BRIDGE and t.plan.bridging for t in ticks if ordered_s < t.at_s < ready_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_full_quality_and_one_replica_return_after_the_burst(bursts: dict[int, Fleet], seed: int) -> None:
    last = bursts[seed].ticks[-1]
    assert (last.plan.by_name("interactive").point, last.ordered) == ("full", 1), str(last.plan)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_knob_raises_attainment_over_replicas_alone(bursts: dict[int, Fleet], seed: int) -> None:
    replicas_only = _burst(seed, _policy(budget={"control": "Off"}))
    assert bursts[seed].attainment() > replicas_only.attainment() + 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_every_tick_keeps_floors_bounds_and_gives_a_reason(bursts: dict[int, Fleet], seed: int) -> None:
    for tick in bursts[seed].ticks:
        assert 1 <= tick.ordered <= 3, str(tick.replica_plan)
        assert tick.plan.message, str(tick.plan)
        for target in tick.plan.classes:
            floor, point, ceiling = (LADDER.index(name) for name in (target.floor, target.point, target.ceiling))
            assert floor <= point <= ceiling, str(target)


def test_replicas_that_a_burst_was_too_much_for_are_kept_for_the_next_one_until_it_is_forgotten() -> None:
    """Ticks of 5 s: the burst is forgotten after `REMEMBERED` of them."""
    scaling = {"minReplicas": 1, "maxReplicas": 3, "behavior": BEHAVIOR}
    fleet = Fleet(_policy(scaling=scaling), profile())
    forgotten_s = 5.0 * REMEMBERED
    fleet.run(poisson(3, [(STEP_S, CALM), (45.0, 14.0), (forgotten_s + 600.0, CALM)]), forgotten_s + 450.0)
    ordered = {tick.at_s: tick.ordered for tick in fleet.ticks}
    assert [ordered[at_s] for at_s in (50.0, 300.0, forgotten_s, forgotten_s + 450.0)] == [1, 2, 2, 1]


def test_a_pod_that_never_becomes_ready_blocks_no_scale_down() -> None:
    fleet = Fleet(_policy(), profile(), pods=1, start_s=lambda n: None)
    fleet.run(poisson(3, [(STEP_S, CALM), (30.0, BURST), (170.0, 1.0)]), 260.0)
    assert max(tick.ordered for tick in fleet.ticks) > 1
    assert fleet.ticks[-1].ordered == 1, str(fleet.ticks[-1].plan)
    reported = [tick.replica_plan for tick in fleet.ticks if tick.replica_plan and tick.replica_plan.stuck_pods]
    assert reported, "the pod was never reported as stuck"
    assert any(plan.status is Status.BLOCKED for plan in reported), [str(plan) for plan in reported]


def test_a_lost_pod_is_covered_by_the_budget() -> None:
    policy = _policy(scaling={"minReplicas": 2, "maxReplicas": 3})
    fleet = Fleet(policy, profile(), pods=2)
    requests = poisson(3, [(100.0, 7.0)])
    fleet.run((one for one in requests if one.arrived_s < 60.0), 60.0)
    assert fleet.points()[-1][1] == "full"
    fleet.lose("pod-0")
    fleet.run((one for one in requests if one.arrived_s > 60.0), 72.0)
    lowered = [tick for tick in fleet.ticks if tick.at_s > 60.0 and tick.plan.by_name("interactive").point != "full"]
    assert lowered
    assert lowered[0].plan.reason is Reason.POD_LOST, str(lowered[0].plan)


def test_operator_restart_in_a_burst_neither_jumps_the_budget_nor_drops_replicas() -> None:
    fleet = Fleet(_policy(), profile())
    requests = poisson(3, [(STEP_S, CALM), (60.0, BURST)])
    fleet.run((one for one in requests if one.arrived_s < 80.0), 80.0)
    before, ordered = fleet.points()[-1][1], fleet.ordered
    assert before != "full"
    fleet.restart_operator()
    fleet.run((one for one in requests if one.arrived_s > 80.0), 120.0)
    after = [tick for tick in fleet.ticks if tick.at_s >= 80.0][1:]
    assert after[0].plan.reason is Reason.ADOPTED
    assert after[0].plan.by_name("interactive").point == before
    assert min(tick.ordered for tick in after) >= ordered


def test_overload_at_all_floors_sheds_the_lowest_class_alone() -> None:
    classes = [
        service_class("interactive", priority=10),
        service_class("bulk", overload="Shed", objectives={"ttftMilliseconds": 3000}),
    ]
    fleet = Fleet(
        _policy(classes=classes, defaultClass="interactive", scaling={"minReplicas": 1, "maxReplicas": 1}), profile()
    )
    requests = poisson(3, [(60.0, 4.0)]) + poisson(5, [(30.0, 0.5), (30.0, 10.0)], name="bulk")
    fleet.run(requests, 60.0)
    shedding = [t for t in fleet.ticks if any(c.admission.value == "Shed" for c in t.plan.classes)]
    assert shedding
    for tick in shedding:
        assert tick.plan.by_name("interactive").admission.value == "Accept"
        assert tick.plan.by_name("bulk").point == tick.plan.by_name("bulk").floor


def test_equal_seeds_give_equal_runs() -> None:
    first, second = _burst(3, _policy(), 100.0), _burst(3, _policy(), 100.0)
    assert [str(tick.plan) for tick in first.ticks] == [str(tick.plan) for tick in second.ticks]
    assert first.attainment() == second.attainment()


def test_requests_are_conserved() -> None:
    requests = poisson(5, [(30.0, 5.0)])
    fleet = Fleet(_policy(), profile())
    fleet.run(requests, 200.0)
    assert len(fleet.finished) + fleet.shed == len(requests)
