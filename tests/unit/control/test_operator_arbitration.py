"""Arbitration between services, from what the operator knows of them."""

from dataclasses import replace
from decimal import Decimal

from prism_operator.control.arbitration import Arbitration
from prism_operator.control.world import World
from prism_operator.plan.fleet import Caps
from tests.unit.plan.factories import (
    demand_of,
    model_spec,
    observation,
    pod,
    service_policy,
    service_spec,
)

NOW_S = 60.0
WIDE = {"minReplicas": 1, "maxReplicas": 50}


class Leads:
    def may_act(self) -> bool:
        return True


class Noted:
    def __init__(self) -> None:
        self.posted: list[tuple[str, str]] = []

    def post(self, regarding, reason: str, action: str, note: str) -> None:
        self.posted.append((regarding.name, reason))


def _service(world: World, name: str, per_s: int, ordered: int = 1, **spec):
    fields = {"scaling": WIDE, **spec}
    service = world.service(("team", name), f"uid-{name}")
    service.spec, service.model = service_spec(**fields), model_spec()
    service.policy = service_policy(**fields)
    service.observation = observation(NOW_S, ordered)
    service.demand = demand_of(service.policy, per_s, NOW_S)
    service.desired_replicas = ordered
    return service


def _arbitrate(world: World, **caps) -> Noted:
    noted = Noted()
    Arbitration(world, Caps(**caps), Leads(), noted).tick()
    return noted


def test_services_share_a_cost_cap_and_those_that_it_cuts_are_told() -> None:
    world = World()
    services = [_service(world, "a", 20), _service(world, "b", 20)]
    noted = _arbitrate(world, per_hour=Decimal(15))
    granted = [service.granted_replicas for service in services]
    assert sum(granted) * Decimal("2.50") <= 15
    assert ("a", "FleetQuotaReached") in noted.posted or ("b", "FleetQuotaReached") in noted.posted


def test_without_caps_nothing_is_limited() -> None:
    world = World()
    service = _service(world, "a", 20)
    assert _arbitrate(world).posted == []
    assert service.granted_replicas is None


def test_services_that_cannot_be_planned_keep_what_they_have_and_it_counts_first() -> None:
    world = World()
    silent = _service(world, "silent", 1, ordered=4)
    silent.observation = observation(NOW_S, (pod(profile=None),))
    owned = _service(world, "owned", 1, ordered=2, scaling={"control": "External"}, replicas=2)
    planned = _service(world, "planned", 40)
    _arbitrate(world, per_hour=Decimal(25))
    assert (silent.granted_replicas, owned.granted_replicas) == (4, None)
    assert planned.granted_replicas == 10 - 4 - 2


def test_grant_never_falls_below_the_minimum_that_the_spec_promises() -> None:
    world = World()
    service = _service(world, "a", 20, scaling={**WIDE, "minReplicas": 3})
    _arbitrate(world, per_hour=Decimal(5))
    assert service.granted_replicas == 3


def test_missing_price_grants_nothing_and_limits_nobody() -> None:
    world = World()
    bare = [{"name": "main", "accelerator": {"name": "demo-gpu"}}]
    services = [_service(world, "a", 20), _service(world, "b", 20, pools=bare)]
    services[0].granted_replicas = 1
    _arbitrate(world, per_hour=Decimal(20))
    assert [service.granted_replicas for service in services] == [None, None]


def test_accelerators_are_shared_like_money() -> None:
    world = World()
    gpu = {"name": "h100", "resource": {"name": "nvidia.com/gpu", "count": 2}}
    pools = [{"name": "main", "accelerator": gpu, "pricePerHour": "2.50"}]
    services = [_service(world, name, 30, pools=pools) for name in ("a", "b")]
    _arbitrate(world, accelerators=15)
    assert sum(service.granted_replicas for service in services) * 2 <= 15


def test_lost_leadership_decides_nothing() -> None:
    world = World()
    service = _service(world, "a", 20)

    class Follows(Leads):
        def may_act(self) -> bool:
            return False

    Arbitration(world, Caps(Decimal(20)), Follows(), Noted()).tick()
    assert service.granted_replicas is None
    assert replace(service.policy, granted_replicas=None) == service.policy


def test_what_one_service_is_granted_of_another_waits_until_that_one_has_given_it_up() -> None:
    world = World()
    calm, busy = _service(world, "calm", 1, ordered=5), _service(world, "busy", 40)
    arbitration = Arbitration(world, Caps(Decimal("2.50") * 6), Leads(), Noted(), clock=lambda: 0.0)
    arbitration.tick()
    assert (calm.granted_replicas, busy.granted_replicas) == (1, 1)
    calm.desired_replicas = 1
    arbitration.tick()
    assert (calm.granted_replicas, busy.granted_replicas) == (1, 5)
