"""Several services under caps that they share, on one clock: what the operator's arbitration makes of them.

Each is a pool of its own with its own load under Prism; what connects them is the arbitration alone, once a minute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prism_operator.plan import sharing
from prism_operator.plan.fleet import Caps, FleetPlan
from prism_operator.plan.sharing import Tenant
from prism_operator.simulate.control import Prism
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.policies import Setting, lengths_of
from prism_operator.simulate.study import TAIL_S, Study, copied, fleet_of


@dataclass(frozen=True, slots=True)
class Member:
    """One of the services. `accelerators`: of one replica, as `pools[].accelerator.resource.count` says."""

    name: str
    study: Study
    accelerators: int = 1


@dataclass(slots=True)
class Together:
    """One run. `plans`: every arbitration and its time; none without caps."""

    members: Sequence[Member]
    fleets: list[Fleet]
    plans: list[tuple[float, FleetPlan]] = field(default_factory=list)

    @property
    def parts(self) -> list[tuple[Member, Prism, Fleet]]:
        return [(member, _prism(fleet), fleet) for member, fleet in zip(self.members, self.fleets, strict=True)]

    @property
    def most_accelerators(self) -> int:
        """Of all replicas that were ordered at one time, whether ready or not; draining pods not counted."""
        return round(self._most([float(member.accelerators) for member in self.members]))

    @property
    def most_per_hour(self) -> float:
        """What these replicas cost; a service without a price counts nothing."""
        return self._most([float(member.study.policy.price_per_hour or 0) for member in self.members])

    def _most(self, weights: Sequence[float]) -> float:
        """The largest sum over services at one time of replicas by weight."""
        by_second = zip(*(fleet.samples for fleet in self.fleets), strict=True)
        sums = (
            sum(weight * sample.provisioned for weight, sample in zip(weights, samples, strict=True))
            for samples in by_second
        )
        return max(sums, default=0.0)


def play(members: Sequence[Member], caps: Caps, seed: int) -> Together:
    """Every service's load from its beginning, until the last request of all, and a while after.

    Raises PriceUnknown if a cost cap meets a service without a price.
    """
    loads = [member.study.workload(seed) for member in members]
    fleets = [
        fleet_of(
            one.study, Setting(one.study.policy, one.study.profile, lengths_of(load), one.study.initial), "prism", seed
        )
        for one, load in zip(members, loads, strict=True)
    ]
    run = Together(members, fleets)
    until_s = max(load[-1].arrived_s for load in loads) + TAIL_S
    for fleet, load in zip(fleets, loads, strict=True):
        fleet.run(copied(load), 0.0)
    at_s = 0.0
    while at_s < until_s:
        if caps != Caps():
            _arbitrate(run, caps, at_s)
        at_s = min(at_s + sharing.SETTLE_S, until_s)
        for fleet in fleets:
            fleet.run((), at_s)
    return run


def _arbitrate(run: Together, caps: Caps, now_s: float) -> None:
    """As the operator does: each limit reaches its service's slow loop with its next tick."""
    tenants = [
        Tenant(one.name, prism.policy, prism.demand, fleet.profile, fleet.ordered, one.accelerators)
        for one, prism, fleet in run.parts
    ]
    planned_s, plan = run.plans[-1] if run.plans else (-math.inf, None)
    if now_s - planned_s >= sharing.PERIOD_S:
        plan = sharing.share(tenants, caps, plan)
        run.plans.append((now_s, plan))
    limits = sharing.limits(tenants, caps, plan)
    for member, prism, _ in run.parts:
        prism.policy = replace(prism.policy, granted_replicas=limits[member.name])


def _prism(fleet: Fleet) -> Prism:
    assert isinstance(fleet.controller, Prism), "nobody else takes grants"
    return fleet.controller
