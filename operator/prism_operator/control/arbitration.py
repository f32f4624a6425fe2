"""Arbitration between services: once a minute, what each may have under the caps that all of them share.

A grant reaches the service's slow loop with its next tick. What cannot be planned keeps what it has, and that is taken
off the caps first: counts that others own, paused and advisory services, and those whose load or profile is unknown.
"""

import asyncio
import logging
from decimal import Decimal

from prism_api.scaling import ScalingControl
from prism_operator.control.events import Events, Regarding
from prism_operator.control.leadership import Leadership
from prism_operator.control.world import ServiceKey, ServiceWorld, World
from prism_operator.plan import fleet
from prism_operator.plan.capacity import scaled
from prism_operator.plan.fleet import Caps, Claim, FleetPlan, PriceUnknown
from prism_operator.plan.reasons import Status

PERIOD_S = 60.0

logger = logging.getLogger(__name__)


class Arbitration:
    """Without caps it grants nothing and limits nothing."""

    def __init__(self, world: World, caps: Caps, leadership: Leadership, events: Events) -> None:
        self._world, self._caps, self._leadership, self._events = world, caps, leadership, events
        self.plan: FleetPlan | None = None
        """The last arbitration."""

    async def run(self) -> None:
        """Arbitrate until cancelled. One that fails is logged; the grants of before stay."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self.tick()
            except Exception:
                logger.exception("arbitration failed")

    def tick(self) -> None:
        """Decide every grant anew."""
        if self._caps == Caps() or not self._leadership.may_act():
            return
        claims: dict[str, Claim] = {}
        money, accelerators = self._caps.per_hour, self._caps.accelerators
        services = {_name(key): service for key, service in self._world.services.items() if service.usable()}
        for name, service in services.items():
            claim = _claim(name, service)
            if claim is not None:
                claims[name] = claim
                continue
            # Unknown is not zero: what it has is counted, and it keeps it.
            service.granted_replicas = None
            held, price, count = _held(service)
            money = None if money is None else max(Decimal(0), money - price * held)
            accelerators = None if accelerators is None else max(0, accelerators - count * held)
        try:
            plan = fleet.arbitrate(claims.values(), Caps(money, accelerators), self.plan)
        except PriceUnknown as error:
            logger.error("no grants: %s", error)
            for name in claims:
                services[name].granted_replicas = None
            return
        for name, grant in plan.grants.items():
            service = services[name]
            policy = service.usable()
            least = 1 if policy is None else max(1, policy.min_replicas)
            service.granted_replicas = max(least, grant.replicas)
            if grant.status is Status.BLOCKED:
                note = "; ".join(filter(None, (grant.message, grant.rejected and f"rejected {grant.rejected}")))
                regarding = Regarding(*service.key, service.uid)
                self._events.post(regarding, "FleetQuotaReached", "Arbitrate", note)
        self.plan = plan
        logger.info("%s", plan)


def _name(key: ServiceKey) -> str:
    return "/".join(key)


def _held(service: ServiceWorld) -> tuple[int, Decimal, int]:
    """Replicas ordered, the price of one, and the accelerators of one."""
    assert service.spec is not None, "a resolved policy comes from a spec"
    pool = service.spec.pool
    resource = pool.accelerator.resource
    ordered = service.desired_replicas or 0
    return ordered, pool.price_per_hour or Decimal(0), 0 if resource is None else resource.count


def _claim(name: str, service: ServiceWorld) -> Claim | None:
    """What the service would do with replicas; None if it decides none, or its load cannot be planned."""
    policy, observation = service.usable(), service.observation
    if policy is None or observation is None or observation.profile is None:
        return None
    if policy.scaling is not ScalingControl.MANAGED or policy.paused or policy.advisory:
        return None
    loads = fleet.mean_loads(service.demand, policy)
    if loads is None:
        return None
    profile = scaled(observation.profile, service.demand.cost_factor)
    return fleet.claim(name, policy, loads, profile, _held(service)[2])
