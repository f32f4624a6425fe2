"""A plan as the message that pods get."""

from prism_api.control import ServiceReference
from prism_operator.plan import budget, directive
from prism_operator.plan.types import BudgetPlan, BudgetState, DemandState, Reason, ServicePolicy, Status
from tests.unit.plan.factories import DIGEST, observation, pod, service_policy

SERVICE = ServiceReference(namespace="demo", name="chat", uid="u-1")


def _plan(policy: ServicePolicy) -> BudgetPlan:
    return budget.decide(observation(1.0, (pod(point="b750"),)), DemandState(), policy, BudgetState())[0]


def test_directive_carries_the_plan_the_objectives_and_the_fence() -> None:
    policy = service_policy(budget={"safePoint": "b875", "envelopeTTLSeconds": 20, "dwell": {"upMilliseconds": 4000}})
    built = directive.build(_plan(policy), policy, service=SERVICE, holder="me", epoch=3, sequence=9)
    assert built is not None
    target = built.classes[0]
    assert (target.name, target.floor, target.point, target.ceiling) == ("interactive", "b500", "b750", "b750")
    assert (target.ttft_ms, target.tpot_ms) == (1500, 200)
    assert (built.fence.epoch, built.fence.sequence, built.holder) == (3, 9, "me")
    assert (built.envelope.ttl_ms, built.envelope.safe_point) == (20_000, "b875")
    assert (built.governor.high, built.governor.low, built.governor.dwell_up_ms) == (900, 400, 4000)
    assert (built.model_digest, built.default_class, built.reason) == (DIGEST, "interactive", "Adopted")


def test_plan_that_asks_for_nothing_builds_no_directive() -> None:
    nothing = BudgetPlan(Status.HOLD, Reason.SIGNALS_STALE, "no pod reported", ())
    assert directive.build(nothing, service_policy(), service=SERVICE, holder="me", epoch=1, sequence=1) is None
