"""Bugs that users reported of other autoscalers and that only requests show, by project and thread."""

from prism_operator.plan.types import LoopSettings, ServicePolicy
from prism_operator.simulate.score import quantiles
from tests.sim.fleet import Fleet, SimRequest, poisson
from tests.unit.plan.factories import profile, service_class, service_policy


def _policy(**changes: object) -> ServicePolicy:
    """Time compressed: pods start within 15 s."""
    behavior = {"scaleUp": {"stabilizationWindowSeconds": 5}, "scaleDown": {"stabilizationWindowSeconds": 60}}
    scaling = {"minReplicas": 1, "maxReplicas": 3, "behavior": behavior}
    return service_policy(LoopSettings(slow_period_s=5.0, pod_ready_s=15.0), **{"scaling": scaling, **changes})


def _waits_s(fleet: Fleet, name: str, since_s: float) -> list[float]:
    return [one.ttft_s for one in fleet.finished if one.service_class == name and one.arrived_s >= since_s]


def test_llmd_1412_overload_beyond_all_replicas_keeps_the_first_tokens_of_what_is_not_shed() -> None:
    """There, the 99 % quantile of TTFT under overload was four to nine minutes at the largest count.

    Here twice what three pods hold at the floors, for five minutes: the class that may be shed is, the other is served
    within its objective once the pods that were ordered are there.
    """
    classes = [
        service_class("interactive", priority=10),
        service_class("bulk", overload="Shed", objectives={"ttftMilliseconds": 3000}),
    ]
    policy = _policy(classes=classes, defaultClass="interactive")
    fleet = Fleet(policy, profile(), pods=3)
    bulk = poisson(5, [(300.0, 40.0)], name="bulk")
    fleet.run([*poisson(3, [(300.0, 12.0)]), *bulk], 400.0)
    assert fleet.lost.shed.get("interactive", 0) == 0
    assert fleet.lost.shed["bulk"] > len(bulk) / 2
    p99_s = quantiles(_waits_s(fleet, "interactive", 30.0))[2]
    assert p99_s is not None
    assert p99_s <= 1.5
    assert max(sample.backlog for sample in fleet.samples if sample.at_s > 30.0) < 60


def test_dynamo_readme_scale_down_ends_no_request_in_flight() -> None:
    """There, a worker that was scaled down took what it ran with it. Here answers outlast the order."""
    fleet = Fleet(_policy(), profile(), pods=3)
    busy = poisson(3, [(40.0, 8.0)])
    long = [SimRequest(38.0 + n, "interactive", 64, 1500) for n in range(12)]
    fleet.run([*busy, *long], 600.0)
    assert fleet.ticks[-1].ordered == 1
    assert fleet.lost.broken == {}
    assert len(fleet.finished) == len(busy) + len(long)
    assert all(one.produced == one.output_tokens for one in fleet.finished)


def test_knative_restart_in_the_middle_of_traffic_gives_up_no_replica_and_the_same_count_in_the_end() -> None:
    kept, restarted = Fleet(_policy(), profile(), pods=2), Fleet(_policy(), profile(), pods=2)
    requests = poisson(7, [(400.0, 8.0)])
    for fleet in (kept, restarted):
        fleet.run([SimRequest(r.arrived_s, r.service_class, r.prompt_tokens, r.output_tokens) for r in requests], 150.0)
    restarted.restart_operator()
    for fleet in (kept, restarted):
        fleet.run((), 400.0)
    after = [tick.ordered for tick in restarted.ticks if 150.0 < tick.at_s < 210.0]
    assert min(after) >= next(tick.ordered for tick in reversed(restarted.ticks) if tick.at_s <= 150.0)
    assert restarted.ticks[-1].ordered == kept.ticks[-1].ordered
