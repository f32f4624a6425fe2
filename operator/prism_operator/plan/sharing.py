"""What arbitration starts from: each service as it is known now, and what becomes of those that nobody can plan for.

Unknown is not zero. Counts that others own, paused and advisory services, and those whose load or profile is unknown
keep what they have, and that is taken off the caps first; the others share what is left (`plan.fleet`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from prism_api.profile import Profile
from prism_api.scaling import ScalingControl
from prism_operator.plan import fleet
from prism_operator.plan.capacity import scaled
from prism_operator.plan.fleet import Caps, Claim, FleetPlan, Ledger
from prism_operator.plan.types import DemandState, ServicePolicy

PERIOD_S = 60.0
"""Between two arbitrations."""
SETTLE_S = 5.0
"""Between two looks at what has been given up meanwhile."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One service among those that share caps. `profile` is None while no pod of it has told one."""

    service: str
    policy: ServicePolicy
    demand: DemandState
    profile: Profile | None
    ordered: int
    accelerators: int
    """Of one replica."""

    @property
    def price_per_hour(self) -> Decimal | None:
        return self.policy.price_per_hour

    @property
    def priority(self) -> int:
        return max(one.priority for one in self.policy.classes)

    @property
    def steered(self) -> bool:
        """Whether the operator orders its replicas."""
        policy = self.policy
        return policy.scaling is ScalingControl.MANAGED and not policy.paused and not policy.advisory


def share(tenants: Iterable[Tenant], caps: Caps, before: FleetPlan | None = None) -> FleetPlan:
    """Grants to every service that can be planned for; the others are not in it, and keep what they have.

    Raises PriceUnknown if a cost cap meets a planned service without a price.
    """
    claims: list[Claim] = []
    ledger = Ledger(caps)
    for tenant in tenants:
        claim = _claim(tenant)
        if claim is None:
            ledger.hold(tenant, tenant.ordered)
        else:
            claims.append(claim)
    return fleet.arbitrate(claims, ledger.left, before)


def limits(tenants: Iterable[Tenant], caps: Caps, plan: FleetPlan | None) -> dict[str, int | None]:
    """Most replicas that each service may order now; None for those whose count others own.

    Grants that fall are in force at once. Those that rise wait for what the others have ordered until now and not given
    up yet, so that no order of any service exceeds the caps, whichever comes first. Services without a grant share
    what nobody was granted, in turns with the spare of the others.
    """
    ordered = sorted(tenants, key=lambda one: (-one.priority, one.service))
    ledger = Ledger(caps)
    for tenant in ordered:
        ledger.hold(tenant, tenant.ordered)
    grants = {} if plan is None else plan.grants
    found: dict[str, int | None] = {}
    turns: list[tuple[Tenant, int]] = []
    for tenant in ordered:
        name, policy = tenant.service, tenant.policy
        if not tenant.steered:
            found[name] = None
            continue
        least, grant = max(1, policy.min_replicas), grants.get(name)
        planned = max(least, tenant.ordered if grant is None else grant.replicas)
        most = policy.max_replicas or planned if grant is None else max(least, grant.replicas + grant.spare)
        fit = ledger.fitting(tenant, max(0, planned - tenant.ordered))
        ledger.take(tenant, fit)
        found[name] = max(least, min(planned, tenant.ordered + fit))
        turns.append((tenant, most))
    while turns:
        turns = [(tenant, most) for tenant, most in turns if _one_more(tenant, most, found, ledger)]
    return found


def _one_more(tenant: Tenant, most: int, found: dict[str, int | None], ledger: Ledger) -> bool:
    """Let a service order one replica more than it was found to; False if it may not."""
    now = found[tenant.service]
    assert now is not None, "only steered services take turns"
    if now >= most or (now >= tenant.ordered and ledger.fitting(tenant, 1) < 1):
        return False
    if now >= tenant.ordered:
        ledger.take(tenant, 1)
    found[tenant.service] = now + 1
    return True


def _claim(tenant: Tenant) -> Claim | None:
    """What the service would do with replicas; None if it decides none, or its load cannot be planned."""
    if tenant.profile is None or not tenant.steered:
        return None
    loads = fleet.mean_loads(tenant.demand, tenant.policy)
    if loads is None:
        return None
    profile = scaled(tenant.profile, tenant.demand.cost_factor)
    return fleet.claim(tenant.service, tenant.policy, loads, profile, tenant.accelerators)
