"""The error budget of quality, the cost cap that sheds, marginal quality, and bridges that do not end."""

from dataclasses import replace
from typing import Any

import pytest

from prism_api.control import Admission
from prism_operator.plan import brownout, budget, floors
from prism_operator.plan.pressure import measure
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    ClassBudgetState,
    Observation,
    Reason,
    ServicePolicy,
    Status,
)
from tests.unit.plan.factories import (
    demand_of,
    observation,
    pod,
    service_class,
    service_policy,
    starting_pod,
)

NAME, NOW_S = "interactive", 60.0
DAILY_S = 8640
"""A tenth of the day: a tenth of a second comes back each second."""


def _limited(seconds: int = DAILY_S) -> ServicePolicy:
    quality = {"minRelativeQuality": "0.90", "maxDegradedSecondsPerDay": seconds}
    return service_policy(classes=[service_class(quality=quality)])


def _state(point: str = "b500", **changes: Any) -> BudgetState:
    return BudgetState({NAME: ClassBudgetState(point, -1000.0, **changes)}, last_s=NOW_S - 10)


def _seen(point: str = "b500", now_s: float = NOW_S) -> Observation:
    return observation(now_s, (pod(point=point),))


def _left(policy: ServicePolicy, state: BudgetState, seen: Observation) -> float:
    left_s = floors.drain(seen, policy, state).classes[NAME].degraded_left_s
    assert left_s is not None
    return left_s


def test_a_second_below_the_top_costs_a_second_and_the_day_gives_them_back() -> None:
    policy = _limited()
    assert _left(policy, _state(degraded_left_s=100.0), _seen()) == pytest.approx(100 - 10 + 1)
    assert _left(policy, _state("full", degraded_left_s=100.0), _seen("full")) == pytest.approx(101)


def test_only_the_share_of_pods_that_run_lower_is_paid_for() -> None:
    seen = observation(NOW_S, (pod("a", point="b500"), pod("b", point="full")))
    assert _left(_limited(), _state(degraded_left_s=100.0), seen) == pytest.approx(100 - 5 + 1)


def test_error_budget_never_exceeds_its_size_and_begins_full() -> None:
    policy = _limited()
    assert _left(policy, _state("full", degraded_left_s=float(DAILY_S)), _seen("full")) == DAILY_S
    assert floors.drain(_seen("full"), policy, _state("full")).classes[NAME].degraded_left_s == DAILY_S


def test_class_without_a_limit_has_no_error_budget() -> None:
    state = floors.drain(_seen(), service_policy(), _state(degraded_left_s=5.0, spent=True))
    assert (state.classes[NAME].degraded_left_s, state.classes[NAME].spent) == (None, False)


def _decide(
    policy: ServicePolicy, state: BudgetState, per_s: int = 8, seen: Observation | None = None
) -> tuple[BudgetPlan, BudgetState]:
    return budget.decide(seen or _seen(), demand_of(policy, per_s, NOW_S), policy, state)


def test_spent_error_budget_lifts_the_floor_at_once_and_says_so() -> None:
    plan, state = _decide(_limited(), _state(degraded_left_s=3.0))
    target = plan.by_name(NAME)
    assert (target.point, target.floor, target.status) == ("full", "full", Status.PROGRESS)
    assert target.reason is Reason.QUALITY_BUDGET_SPENT
    assert "432 s are back" in target.message
    assert state.classes[NAME].spent


def test_floor_stays_lifted_until_a_twentieth_is_back() -> None:
    policy = _limited()
    low, _ = _decide(policy, _state("full", degraded_left_s=430.0, spent=True), seen=_seen("full"))
    assert low.by_name(NAME).point == "full"
    back, _ = _decide(policy, _state("full", degraded_left_s=432.0, spent=True), seen=_seen("full"))
    assert back.by_name(NAME).point != "full"


def test_fixed_and_paused_services_are_not_moved_by_the_error_budget() -> None:
    quality = {"minRelativeQuality": "0.90", "maxDegradedSecondsPerDay": 60}
    classes = [service_class(quality=quality)]
    fixed = service_policy(classes=classes, budget={"control": "Fixed", "operatingPoint": "b500"})
    paused = service_policy(classes=classes, mode="Paused")
    for policy in (fixed, paused):
        plan, _ = _decide(policy, _state(degraded_left_s=0.0, spent=True))
        assert plan.by_name(NAME).point == "b500"


def test_restart_goes_on_with_what_the_status_says_is_left() -> None:
    seen = replace(_seen(), degraded_left_s={NAME: 120.0})
    _, state = budget.decide(seen, demand_of(_limited(), 3, NOW_S), _limited(), BudgetState())
    assert state.classes[NAME].degraded_left_s == 120.0


class TestCapThatSheds:
    def _policy(self, on_cap: str) -> ServicePolicy:
        return service_policy(classes=[service_class(overload="Shed")], cost={"maxPerHour": "2.50", "onCap": on_cap})

    def test_quality_is_kept_and_requests_are_turned_away(self) -> None:
        plan, _ = _decide(self._policy("Shed"), _state("full"), 9, _seen("full"))
        target = plan.by_name(NAME)
        assert (target.point, target.admission, target.reason) == ("full", Admission.SHED, Reason.COST_CAP)

    def test_by_default_quality_is_given_up_first(self) -> None:
        plan, _ = _decide(self._policy("DegradeThenShed"), _state("full"), 8, _seen("full"))
        target = plan.by_name(NAME)
        assert (target.point, target.admission) == ("b500", Admission.ACCEPT)

    def test_pods_that_the_cap_pays_for_and_that_start_are_bridged(self) -> None:
        policy = service_policy(classes=[service_class(overload="Shed")], cost={"maxPerHour": "5", "onCap": "Shed"})
        seen = observation(NOW_S, (pod(), starting_pod("pod-1", NOW_S - 5)))
        plan, _ = _decide(policy, _state("full"), 8, seen)
        assert plan.by_name(NAME).point == "b500"


class TestMarginalQuality:
    NAMES = ("gold", "bulk")

    def _policy(self, mode: str = "MarginalQuality") -> ServicePolicy:
        classes = [service_class("gold", priority=100), service_class("bulk")]
        return service_policy(classes=classes, defaultClass="gold", budget={"brownout": mode})

    def _path(self, rates: dict[str, int], mode: str = "MarginalQuality") -> list[dict[str, str]]:
        policy = self._policy(mode)
        state = BudgetState({name: ClassBudgetState("full", -1000.0) for name in self.NAMES})
        seen = observation(NOW_S, (pod(classes=self.NAMES),))
        pressure = measure(seen, demand_of(policy, rates, NOW_S), policy, state)
        return list(brownout.steps_down(policy, pressure, dict.fromkeys(self.NAMES, "full")))

    def test_class_with_less_to_lose_for_what_it_frees_sinks_first(self) -> None:
        first = self._path({"gold": 1, "bulk": 6})[0]
        assert first != {"gold": "full", "bulk": "full"}
        steps = self._path({"gold": 1, "bulk": 6}, "LowestPriorityFirst")
        assert steps[0] == {"gold": "full", "bulk": "b875"}
        assert steps[3] == {"gold": "full", "bulk": "b500"}, "to its floor before the next moves"

    def test_every_path_ends_at_the_floors_one_step_at_a_time(self) -> None:
        for mode in ("MarginalQuality", "LowestPriorityFirst"):
            path = self._path({"gold": 3, "bulk": 2}, mode)
            assert len(path) == 8
            assert path[-1] == dict.fromkeys(self.NAMES, "b500")

    def test_steps_alternate_where_both_classes_lose_alike(self) -> None:
        path = self._path({"gold": 4, "bulk": 4})
        assert path[1] != {"gold": "full", "bulk": "b750"}, "the second step of one class gives up more than the first"


def test_bridge_that_outlasts_a_start_is_blocked_and_not_silent() -> None:
    policy = service_policy()
    seen = observation(NOW_S, (pod(point="b500"), starting_pod("pod-1", NOW_S - 300)))
    state = replace(_state(), bridging_since_s=NOW_S - 300)
    plan, _ = _decide(policy, state, 8, seen)
    assert (plan.status, plan.reason) == (Status.BLOCKED, Reason.BURST_BRIDGE)
    assert "1 replicas have been missing for 300 s" in plan.message
    young, _ = _decide(policy, replace(state, bridging_since_s=NOW_S - 30), 8, seen)
    assert young.status is Status.HOLD


def test_shortage_in_a_rehearsal_is_called_that_and_is_no_bridge() -> None:
    seen = observation(NOW_S, (pod("pod-0"), pod("pod-1", serving=False)))
    plan, state = _decide(service_policy(), replace(_state("full"), known_pods=("uid-pod-0", "uid-pod-1")), 8, seen)
    assert (plan.reason, plan.bridging) == (Reason.REHEARSAL, False)
    assert state.lost_s is None


def test_sleeping_service_has_nothing_to_steer_and_is_not_blocked() -> None:
    seen = observation(NOW_S, (), ordered_replicas=0)
    plan, _ = _decide(service_policy(), _state("full"), 0, seen)
    assert (plan.status, plan.reason) == (Status.HOLD, Reason.IDLE)
