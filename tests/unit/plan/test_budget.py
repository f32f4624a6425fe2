"""The fast decision, one tick at a time."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from prism_api.control import Admission
from prism_operator.plan import budget, demand
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    ClassBudgetState,
    ClassDelta,
    DemandState,
    Reason,
    ServicePolicy,
    Status,
)
from tests.unit.plan.factories import (
    demand_of,
    histogram,
    load,
    observation,
    pod,
    service_class,
    service_policy,
    starting_pod,
)

NAME = "interactive"
LOW, HIGH = 3, 8
"""Arrivals a second: one pod holds 5.6 at `full` and 9.0 at `b500`."""
NOW_S = 60.0


def _state(point: str = "full", moved_s: float = -1000.0, **changes: Any) -> BudgetState:
    return BudgetState({NAME: ClassBudgetState(point, moved_s, **changes)}, known_pods=("uid-pod-0",))


def _decide(
    per_s: int, policy: ServicePolicy | None = None, state: BudgetState | None = None, **changes: Any
) -> tuple[BudgetPlan, BudgetState]:
    policy = policy or service_policy()
    seen = observation(NOW_S, **changes)
    return budget.decide(seen, demand_of(policy, per_s, NOW_S), policy, state or _state())


def test_calm_service_stays_at_full() -> None:
    plan, _ = _decide(LOW)
    assert (plan.status, plan.reason, plan.by_name(NAME).point) == (Status.HOLD, Reason.AT_FULL, "full")
    assert plan.fits


def test_load_beyond_capacity_jumps_to_the_highest_point_that_fits_at_once() -> None:
    plan, _ = _decide(HIGH)
    target = plan.by_name(NAME)
    assert (plan.status, plan.reason, target.point) == (Status.PROGRESS, Reason.BROWNOUT, "b500")
    assert "rejected 'b625': load would not fit" in target.message


def test_backlog_alone_lowers_the_budget() -> None:
    plan, _ = _decide(LOW, pods=(pod(load=load(waiting=8)),))
    assert plan.by_name(NAME).point != "full"
    assert "waiting" in plan.message


def test_what_waits_at_one_pod_of_three_is_not_the_pools_matter() -> None:
    hot, calm = pod("pod-0", load=load(waiting=12)), [pod(f"pod-{n}", load=load(waiting=1)) for n in (1, 2)]
    assert _decide(LOW, pods=(hot, *calm))[0].by_name(NAME).point == "full"
    everywhere = tuple(pod(f"pod-{n}", load=load(waiting=20)) for n in range(3))
    assert _decide(LOW, pods=everywhere)[0].by_name(NAME).point != "full"


@pytest.mark.parametrize(("ready_s", "point"), [(30, "full"), (90, "b875")])
def test_latency_in_the_minute_after_a_pod_joined_others_says_nothing_where_the_load_fits(
    ready_s: float, point: str
) -> None:
    """It gets every request until it is as full as the others; 1,600 of 1,500 ms are missed objectives."""
    policy = service_policy()
    slow = demand_of(policy, LOW, NOW_S, ttft_ms=1600)
    pods = (pod("old", ready_s=NOW_S - 500), pod("new", ready_s=NOW_S - ready_s))
    plan, _ = budget.decide(observation(NOW_S, pods=pods), slow, policy, _state())
    assert plan.by_name(NAME).point == point


@pytest.mark.parametrize(("ttft_ms", "point"), [(1000, "full"), (1600, "b875")])
def test_latency_in_a_pools_first_minute_counts_only_if_objectives_are_missed(ttft_ms: float, point: str) -> None:
    policy = service_policy()
    slow = demand_of(policy, LOW, NOW_S, ttft_ms=ttft_ms)
    plan, _ = budget.decide(observation(NOW_S, pods=(pod(ready_s=NOW_S - 30),)), slow, policy, _state())
    assert plan.by_name(NAME).point == point


def test_saturation_above_high_takes_one_step() -> None:
    policy = service_policy()
    seen = demand_of(policy, LOW, NOW_S, tpot_ms=170.0)
    plan, state = budget.decide(observation(NOW_S), seen, policy, _state())
    assert plan.by_name(NAME).point == "b875"
    again, _ = budget.decide(observation(NOW_S + 1), seen, policy, state)
    assert again.by_name(NAME).point == "b875", "samples from before the move count once"


def test_step_up_needs_the_whole_dwell_without_a_break() -> None:
    policy = service_policy()
    state, moves = _state("b500"), []
    for tick in range(25):
        seen = observation(NOW_S + tick, pods=(pod(point=state.classes[NAME].point),))
        plan, state = budget.decide(seen, demand_of(policy, LOW, NOW_S + tick), policy, state)
        if plan.status is Status.PROGRESS:
            moves.append((tick, plan.by_name(NAME).point))
        else:
            assert plan.reason is Reason.DWELL, str(plan)
    assert moves == [(10, "b625"), (21, "b750")]


def test_step_up_that_was_taken_back_at_once_makes_the_next_one_wait_longer() -> None:
    policy = service_policy()
    rise = replace(_state("full"), classes={NAME: ClassBudgetState("full", NOW_S - 20, risen_s=NOW_S - 20)})
    _, flapped = budget.decide(observation(NOW_S, 2), demand_of(policy, 11, NOW_S), policy, rise)
    assert (flapped.classes[NAME].point, flapped.classes[NAME].patience) == ("b875", 2)
    _, burst = budget.decide(observation(NOW_S), demand_of(policy, HIGH, NOW_S), policy, rise)
    assert (burst.classes[NAME].point, burst.classes[NAME].patience) == ("b500", 1), "a burst is no flap"


def test_step_up_that_was_kept_lets_the_next_one_wait_half_as_long() -> None:
    waiting = {"patience": 8, "low_since_s": NOW_S - 80, "narrow_since_s": NOW_S - 80}
    kept = _state("b750", NOW_S - 90, risen_s=NOW_S - 90, **waiting)
    _, rising = _decide(LOW, state=kept, pods=(pod(point="b750"),))
    assert (rising.classes[NAME].point, rising.classes[NAME].patience) == ("b875", 4)
    taken_back = _state("b750", NOW_S - 90, risen_s=NOW_S - 95, **waiting)
    _, wary = _decide(LOW, state=taken_back, pods=(pod(point="b750"),))
    assert (wary.classes[NAME].point, wary.classes[NAME].patience) == ("b875", 8)


@pytest.mark.parametrize(("since_s", "ttft_ms", "point"), [(3, 1000, "b875"), (8, 1000, "b750"), (3, 1600, "b750")])
def test_latency_asks_for_a_second_step_when_its_window_is_renewed_or_objectives_are_missed(
    since_s: int, ttft_ms: float, point: str
) -> None:
    """Of 1,500 ms. Those who waited before the first step still report it for a while."""
    policy = service_policy()
    slow = demand_of(policy, LOW, NOW_S, ttft_ms=ttft_ms)
    state = _state("b875", NOW_S - since_s)
    plan, _ = budget.decide(observation(NOW_S, pods=(pod(point="b875"),)), slow, policy, state)
    assert plan.by_name(NAME).point == point


def test_load_that_just_fits_above_gets_it_after_a_whole_down_window() -> None:
    """5 a second fit one pod at full with 5 % to spare and not with 15 %: quality must not stay down for good."""
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 60}}
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 3, "behavior": behavior})
    state, moves = _state("b875"), []
    for tick in range(70):
        seen = observation(NOW_S + tick, pods=(pod(point=state.classes[NAME].point),))
        plan, state = budget.decide(seen, demand_of(policy, 5, NOW_S + tick), policy, state)
        if plan.status is Status.PROGRESS:
            moves.append((tick, plan.by_name(NAME).point))
    assert moves == [(60, "full")]


def test_no_step_up_while_a_pod_runs_at_another_point() -> None:
    plan, state = _decide(LOW, state=_state("b625"), pods=(pod(point="b500"),))
    assert plan.by_name(NAME).point == "b625"
    assert "not every pod runs" in plan.message
    assert state.classes[NAME].low_since_s is None


def test_no_step_up_to_a_point_that_would_be_saturated() -> None:
    policy = service_policy()
    seen = demand_of(policy, HIGH - 1, NOW_S, tpot_ms=60.0)
    plan, _ = budget.decide(observation(NOW_S, pods=(pod(point="b500"),)), seen, policy, _state("b500"))
    assert plan.by_name(NAME).point == "b500"
    assert "rejected 'b625'" in plan.message


def test_shortage_that_ordered_replicas_would_end_is_a_bridge() -> None:
    pods = (pod(), starting_pod("pod-1", NOW_S - 5))
    plan, _ = _decide(HIGH, pods=pods)
    assert (plan.reason, plan.bridging) == (Reason.BURST_BRIDGE, True)
    assert plan.by_name(NAME).point == "b500"


def test_bridge_at_the_floor_keeps_its_name() -> None:
    pods = (pod(point="b500"), starting_pod("pod-1", NOW_S - 5))
    plan, _ = _decide(12, state=_state("b500"), pods=pods)
    assert (plan.status, plan.reason) == (Status.BLOCKED, Reason.BURST_BRIDGE)


def test_bridge_is_over_when_no_pod_is_missing_although_quality_is_not_back() -> None:
    state = _state("b500", cause=Reason.BURST_BRIDGE)
    plan, after = _decide(HIGH, state=state, pods=(pod(point="b500"),))
    assert plan.by_name(NAME).point == "b500"
    _, bridged = _decide(HIGH, state=state, pods=(pod(point="b500"), starting_pod("pod-1", NOW_S - 5)))
    assert (after.classes[NAME].cause, bridged.classes[NAME].cause) == (Reason.BROWNOUT, Reason.BURST_BRIDGE)


def test_disabled_bridge_waits_for_replicas_at_the_same_point() -> None:
    policy = service_policy(budget={"bridgeScaleUp": "Disabled"})
    plan, _ = _decide(HIGH, policy, pods=(pod(), starting_pod("pod-1", NOW_S - 5)))
    assert plan.by_name(NAME).point == "full"


def test_pod_that_vanished_unasked_is_named_as_the_cause() -> None:
    state = replace(_state(), known_pods=("uid-pod-0", "uid-pod-1"))
    plan, state = _decide(HIGH, state=state, ordered_replicas=2)
    assert plan.reason is Reason.POD_LOST
    assert state.lost_s == NOW_S


def test_pod_that_was_told_to_stop_is_not_lost() -> None:
    state = replace(_state(), known_pods=("uid-pod-0", "uid-pod-1"))
    pods = (pod(), pod("pod-1", ready=False, deleting=True))
    _, state = _decide(LOW, state=state, pods=pods, ordered_replicas=1)
    assert state.lost_s is None


def test_shortage_in_a_rollout_is_called_rollout() -> None:
    plan, _ = _decide(HIGH, ordered_replicas=2, rollout=True)
    assert plan.reason is Reason.ROLLOUT


def test_first_tick_repeats_what_pods_hold() -> None:
    policy = service_policy()
    plan, state = budget.decide(observation(NOW_S, pods=(pod(point="b625"),)), DemandState(), policy, BudgetState())
    assert (plan.reason, plan.by_name(NAME).point) == (Reason.ADOPTED, "b625")
    assert (plan.by_name(NAME).floor, plan.by_name(NAME).ceiling) == ("b500", "b625")
    assert state.classes[NAME].point == "b625"


def test_nothing_is_sent_before_a_pod_reported() -> None:
    pods = (pod(stale=True, points={}),)
    plan, state = budget.decide(observation(NOW_S, pods=pods), DemandState(), service_policy(), BudgetState())
    assert plan.classes == ()
    assert state.classes == {}


def test_adopted_point_below_the_floor_is_raised_to_it() -> None:
    policy = service_policy(classes=[service_class(quality={"minRelativeQuality": "0.97"})])
    plan, _ = budget.decide(observation(NOW_S, pods=(pod(point="b500"),)), DemandState(), policy, BudgetState())
    assert plan.by_name(NAME).point == "b750"


def test_new_spec_with_a_higher_floor_takes_effect_at_once() -> None:
    policy = service_policy(classes=[service_class(quality={"minRelativeQuality": "0.99"})])
    plan, _ = _decide(LOW, policy, _state("b500"))
    assert plan.by_name(NAME).point == "b875"


@pytest.mark.parametrize(
    ("spec", "reason", "point"),
    [
        ({"mode": "Paused"}, Reason.PAUSED, "b750"),
        ({"budget": {"control": "Off"}}, Reason.AT_FULL, "full"),
        ({"budget": {"control": "Fixed", "operatingPoint": "b625"}}, Reason.PINNED, "b625"),
    ],
)
def test_modes_without_steering_leave_no_range(spec: dict[str, Any], reason: Reason, point: str) -> None:
    plan, _ = _decide(HIGH, service_policy(**spec), _state("b750"))
    target = plan.by_name(NAME)
    assert plan.reason is reason
    assert (target.floor, target.point, target.ceiling) == (point, point, point)


def test_fixed_point_below_a_floor_is_raised_to_it() -> None:
    classes = [service_class(quality={"minRelativeQuality": "0.97"})]
    plan, _ = _decide(LOW, service_policy(classes=classes, budget={"control": "Fixed", "operatingPoint": "b500"}))
    assert plan.by_name(NAME).point == "b750"


def test_points_are_held_when_most_pods_are_silent() -> None:
    pods = (pod("a", point="b750"), pod("b", stale=True), pod("c", stale=True))
    plan, _ = _decide(HIGH, state=_state("b750"), pods=pods)
    assert (plan.status, plan.reason, plan.by_name(NAME).point) == (Status.BLOCKED, Reason.SIGNALS_STALE, "b750")
    assert plan.by_name(NAME).floor == "b500", "governors keep their range"


def test_silent_pod_counts_at_full() -> None:
    both, _ = _decide(14, pods=(pod("a"), pod("b")))
    one_silent, _ = _decide(14, pods=(pod("a"), pod("b", stale=True)))
    ladder = service_policy().ladder
    assert ladder.index(one_silent.by_name(NAME).point) < ladder.index(both.by_name(NAME).point)


def test_silent_pod_counts_at_full_and_not_as_gone() -> None:
    plan, _ = _decide(10, pods=(pod("a"), pod("b", stale=True)))
    assert plan.by_name(NAME).point == "full"


def test_unknown_load_never_raises_a_budget() -> None:
    plan, _ = budget.decide(observation(NOW_S), DemandState(), service_policy(), _state("b500"))
    assert plan.by_name(NAME).point == "b500"
    assert "unknown" in plan.message


def test_without_profile_saturation_moves_single_steps() -> None:
    policy = service_policy()
    seen = observation(NOW_S, pods=(pod(profile=None),))
    plan, _ = budget.decide(seen, demand_of(policy, HIGH, NOW_S, tpot_ms=190.0), policy, _state())
    assert plan.by_name(NAME).point == "b875"
    assert plan.fits is None


def test_without_profile_a_queue_moves_a_step_although_nothing_finished() -> None:
    policy = service_policy()
    seen = observation(NOW_S, pods=(pod(profile=None, load=load(waiting=20)),))
    plan, _ = budget.decide(seen, DemandState(), policy, _state())
    assert plan.by_name(NAME).point == "b875"


def test_longer_dwell_down_delays_the_next_step() -> None:
    policy = service_policy(budget={"dwell": {"downMilliseconds": 5000}})
    plan, _ = _decide(HIGH, policy, _state("b875", moved_s=NOW_S - 2))
    assert plan.by_name(NAME).point == "b875"


class TestTwoClasses:
    NAMES = ("gold", "bulk")

    def _policy(self, **gold: Any) -> ServicePolicy:
        classes = [service_class("gold", priority=100, **gold), service_class("bulk", overload="Shed")]
        scaling = {"minReplicas": 1, "maxReplicas": 1}
        return service_policy(classes=classes, defaultClass="gold", scaling=scaling)

    def _run(self, rates: dict[str, int], policy: ServicePolicy, points: tuple[str, str]) -> BudgetPlan:
        classes = {name: ClassBudgetState(point, -1000.0) for name, point in zip(self.NAMES, points, strict=True)}
        seen = observation(NOW_S, pods=(pod(classes=self.NAMES),))
        return budget.decide(seen, demand_of(policy, rates, NOW_S), policy, BudgetState(classes))[0]

    def test_lowest_priority_sinks_to_its_floor_before_the_next_moves(self) -> None:
        plan = self._run({"gold": 3, "bulk": 3}, self._policy(), ("full", "full"))
        assert plan.by_name("bulk").point == "b500"
        plan = self._run({"gold": 3, "bulk": 5}, self._policy(), ("full", "b500"))
        assert plan.by_name("gold").point != "full"

    def test_class_without_load_does_not_sink(self) -> None:
        plan = self._run({"gold": 7, "bulk": 0}, self._policy(), ("full", "full"))
        assert (plan.by_name("bulk").point, plan.by_name("gold").point != "full") == ("full", True)

    def test_floor_of_full_never_sinks(self) -> None:
        policy = self._policy(quality={"minRelativeQuality": "1"})
        plan = self._run({"gold": 9, "bulk": 9}, policy, ("full", "b500"))
        assert plan.by_name("gold").point == "full"

    def test_overload_at_all_floors_sheds_the_class_that_allows_it(self) -> None:
        plan = self._run({"gold": 5, "bulk": 9}, self._policy(), ("b500", "b500"))
        assert plan.by_name("bulk").admission is Admission.SHED
        assert plan.by_name("gold").admission is Admission.ACCEPT
        assert plan.fits is False

    def test_class_that_queues_is_never_shed(self) -> None:
        plan = self._run({"gold": 14, "bulk": 3}, self._policy(), ("b500", "b500"))
        assert plan.by_name("bulk").admission is Admission.SHED
        assert plan.by_name("gold").admission is Admission.ACCEPT

    def test_nothing_is_shed_above_the_floors(self) -> None:
        plan = self._run({"gold": 3, "bulk": 4}, self._policy(), ("full", "full"))
        assert plan.by_name("bulk").admission is Admission.ACCEPT

    def test_highest_priority_rises_first(self) -> None:
        policy = self._policy()
        state = BudgetState({name: ClassBudgetState("b500", -1000.0) for name in self.NAMES})
        for tick in range(11):
            seen = observation(NOW_S + tick, pods=(pod(point="b500", classes=self.NAMES),))
            history = demand_of(policy, {"gold": 1, "bulk": 1}, NOW_S + tick)
            plan, state = budget.decide(seen, history, policy, state)
        assert (plan.by_name("gold").point, plan.by_name("bulk").point) == ("b625", "b500")


def test_latency_beyond_the_clamp_counts_as_the_clamp() -> None:
    policy = service_policy()
    state = demand_of(policy, LOW, NOW_S - 1)
    slow = ClassDelta(arrived=3, finished=3, ttft=histogram(90_000, 3), tpot=histogram(50, 3))
    state = demand.update(state, observation(NOW_S, classes={NAME: slow}), policy)
    plan, _ = budget.decide(observation(NOW_S), state, policy, _state())
    assert plan.by_name(NAME).saturation == policy.loop.clamp


def test_state_is_plain_enough_for_json() -> None:
    _, state = _decide(HIGH)
    assert json.loads(json.dumps(asdict(state)))["classes"][NAME]["point"] == "b500"


def test_plan_prints_as_one_line() -> None:
    plan, _ = _decide(HIGH)
    assert str(plan).startswith("budget Progress Brownout: interactive=b500; ")
    assert "\n" not in str(plan)
