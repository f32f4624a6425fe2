"""What services may order between two arbitrations: never together more than there is, whoever acts first."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_operator.plan import sharing
from prism_operator.plan.fleet import Caps
from prism_operator.plan.sharing import Tenant
from prism_operator.plan.types import DemandState
from tests.unit.plan.factories import demand_of, profile, service_policy

NOW_S = 60.0


@st.composite
def tenants_of(draw: st.DrawFn) -> list[Tenant]:
    """Up to four services: busy, calm or unknown, some of them owned by somebody else."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        least = draw(st.integers(1, 2))
        owned = draw(st.booleans()) and draw(st.booleans())
        scaling = {"control": "External" if owned else "Managed", "minReplicas": least, "maxReplicas": 12}
        policy = service_policy(scaling=scaling, **({"replicas": least} if owned else {}))
        rate = draw(st.sampled_from([0, 2, 20, 40]))
        known = rate and draw(st.booleans())
        seen = demand_of(policy, rate, NOW_S) if known else DemandState()
        ordered = draw(st.integers(least, 6))
        made.append(Tenant(f"s{number}", policy, seen, profile(), ordered, draw(st.integers(1, 2))))
    return made


def _held(tenants: list[Tenant]) -> int:
    return sum(one.accelerators * one.ordered for one in tenants)


@settings(max_examples=150, deadline=None)
@given(tenants_of(), st.integers(4, 40), st.permutations(range(4)), st.data())
def test_orders_within_the_limits_never_exceed_the_cap_in_whatever_order_they_come(
    tenants: list[Tenant], cap: int, turns: list[int], data: st.DataObject
) -> None:
    caps = Caps(accelerators=cap)
    plan = sharing.share(tenants, caps)
    for _ in range(3):
        limits = sharing.limits(tenants, caps, plan)
        before = _held(tenants)
        for turn in turns:
            if turn >= len(tenants) or (limit := limits[tenants[turn].service]) is None:
                continue
            least = tenants[turn].policy.min_replicas
            # Told to go below what it has, a service may take its time; told that it may have more, it need not.
            ordered = data.draw(st.integers(least, max(limit, tenants[turn].ordered)))
            tenants[turn] = replace(tenants[turn], ordered=ordered)
            assert _held(tenants) <= max(cap, before)


@settings(max_examples=100, deadline=None)
@given(tenants_of(), st.integers(4, 40))
def test_limits_end_at_the_grants_once_everybody_has_followed(tenants: list[Tenant], cap: int) -> None:
    caps = Caps(accelerators=cap)
    plan = sharing.share(tenants, caps)
    for _ in range(2):
        limits = sharing.limits(tenants, caps, plan)
        tenants = [one if (limit := limits[one.service]) is None else replace(one, ordered=limit) for one in tenants]
    for one in tenants:
        grant, limit = plan.grants.get(one.service), limits[one.service]
        if grant is None or limit is None:
            continue
        assert limit <= max(one.policy.min_replicas, grant.replicas + grant.spare)
        if _held(tenants) < cap and not plan.unserved:
            assert limit >= grant.replicas
