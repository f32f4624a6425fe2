"""Arbitration between services: once a minute, what each may have under the caps that all of them share.

Every few seconds it looks who has given up what others were granted, so that both never hold it at once. A limit
reaches the service's slow loop with its next tick. What is shared, and by whom, is `plan.sharing`'s matter.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from prism_operator.control.events import Events, Regarding
from prism_operator.control.leadership import Leadership
from prism_operator.control.world import ServiceKey, ServiceWorld, World
from prism_operator.plan import sharing
from prism_operator.plan.fleet import Caps, FleetPlan, Grant, PriceUnknown
from prism_operator.plan.reasons import Status
from prism_operator.plan.sharing import Tenant
from prism_operator.plan.types import ServicePolicy

logger = logging.getLogger(__name__)


class Arbitration:
    """Without caps it grants nothing and limits nothing."""

    def __init__(
        self,
        world: World,
        caps: Caps,
        leadership: Leadership,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world, self._caps, self._leadership, self._events = world, caps, leadership, events
        self._clock, self._planned_s = clock, -math.inf
        self.plan: FleetPlan | None = None
        """The last arbitration."""
        self.priced = True
        """Whether every service that a cost cap is about has a price; without one nothing can be shared out."""

    async def run(self) -> None:
        """Arbitrate until cancelled. One that fails is logged; the limits of before stay."""
        while True:
            try:
                self.tick()
            except Exception:
                logger.exception("arbitration failed")
            await asyncio.sleep(sharing.SETTLE_S)

    def tick(self) -> None:
        """Decide every grant anew if that is due, and what each service may order now."""
        if self._caps == Caps() or not self._leadership.may_act():
            return
        usable = [(service, policy) for service in self._world.services.values() if (policy := service.usable())]
        tenants = [_tenant(*one) for one in usable]
        if self._clock() - self._planned_s >= sharing.PERIOD_S:
            self._planned_s = self._clock()
            self._plan(tenants)
        limits = sharing.limits(tenants, self._caps, self.plan) if self.priced else {}
        for service, _ in usable:
            service.granted_replicas = limits.get(_name(service.key))

    def _plan(self, tenants: Sequence[Tenant]) -> None:
        try:
            self.plan = sharing.share(tenants, self._caps, self.plan)
            self.priced = True
        except PriceUnknown as error:
            logger.error("nothing is limited: %s", error)
            self.priced = False
            return
        logger.info("%s", self.plan)
        for name, grant in self.plan.grants.items():
            if grant.status is Status.BLOCKED:
                self._tell(self._world.services[_key(name)], grant)

    def _tell(self, service: ServiceWorld, grant: Grant) -> None:
        note = "; ".join(filter(None, (grant.message, grant.rejected and f"rejected {grant.rejected}")))
        self._events.post(Regarding(*service.key, service.uid), "FleetQuotaReached", "Arbitrate", note)


def _name(key: ServiceKey) -> str:
    return "/".join(key)


def _key(name: str) -> ServiceKey:
    namespace, _, service = name.partition("/")
    return namespace, service


def _tenant(service: ServiceWorld, policy: ServicePolicy) -> Tenant:
    assert service.spec is not None, "a resolved policy comes from a spec"
    resource = service.spec.pool.accelerator.resource
    return Tenant(
        service=_name(service.key),
        policy=policy,
        demand=service.demand,
        profile=None if service.observation is None else service.observation.profile,
        ordered=service.desired_replicas or 0,
        accelerators=0 if resource is None else resource.count,
    )
