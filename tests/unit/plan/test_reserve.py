"""What the load asks for: in which coin the reserve is held, what a cost target does, what a forecast adds."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from prism_operator.plan import demand, need, rehearsal, replicas
from prism_operator.plan.forecast import SCORED, ForecastState
from prism_operator.plan.need import Ask
from prism_operator.plan.surprise import Excess, SurpriseState
from prism_operator.plan.types import Reason, Rehearsal, ReplicaPlan, ReplicaState, Status
from tests.unit.plan.factories import delta, demand_of, load, observation, pod, service_policy

NAME, NOW_S, READY_S = "interactive", 1000.0, 120.0
FULL_HISTORY = ReplicaState(since_s=0.0)


def _scaling(**changes: Any) -> dict[str, Any]:
    return {"minReplicas": 1, "maxReplicas": 100, "maxStep": 64, "headroom": "0.5", **changes}


def _ask(
    per_s: int,
    forecasts: dict[str, ForecastState] | None = None,
    surprises: dict[str, SurpriseState] | None = None,
    **spec: Any,
) -> Ask:
    policy = service_policy(**{"scaling": _scaling(), **spec})
    history = demand_of(policy, per_s, NOW_S)
    return need.ask(observation(NOW_S), history, policy, forecasts or {}, surprises or {}, READY_S)


def _decide(per_s: int, pods: int = 1, **spec: Any) -> ReplicaPlan:
    policy = service_policy(**{"scaling": _scaling(), **spec})
    history = replace(demand_of(policy, per_s, NOW_S), since_s=0.0)
    return replicas.decide(observation(NOW_S, pods), history, policy, FULL_HISTORY)[0]


@pytest.mark.parametrize(("reserve", "up", "down"), [("Quality", 10, 13), ("Mixed", 13, 15), ("Replicas", 15, 18)])
def test_reserve_says_how_much_headroom_stands_in_pods(reserve: str, up: int, down: int) -> None:
    """56 requests a second need 9.99 replicas at full and 6.2 at the floor; half as much again is headroom."""
    asked = _ask(56, scaling=_scaling(reserve=reserve))
    assert asked.inputs["need_nominal"] == pytest.approx(9.99, abs=0.01)
    assert (asked.up, asked.down) == (up, down)


@pytest.mark.parametrize("reserve", ["Quality", "Mixed", "Replicas"])
def test_every_reserve_keeps_what_it_asked_for(reserve: str) -> None:
    for per_s in range(1, 80):
        asked = _ask(per_s, scaling=_scaling(reserve=reserve))
        assert asked.up is not None
        assert asked.down is not None
        assert asked.up <= asked.down, f"{per_s}/s: what is ordered must pass the N/(N-1) test, or it flaps"


def test_cost_target_prefers_a_lower_budget_to_more_replicas() -> None:
    free, bound = _ask(28), _ask(28, cost={"targetPerHour": "10"})
    assert free.up is not None
    assert bound.up is not None
    assert bound.up < free.up
    assert set(bound.nominal.values()) == {"b500"}


def test_cost_target_never_plans_below_a_floor() -> None:
    classes = [{"name": NAME, "objectives": {"ttftMilliseconds": 1500}, "quality": {"minRelativeQuality": "0.97"}}]
    assert _ask(56, classes=classes, cost={"targetPerHour": "2.50"}).nominal == {NAME: "b750"}


def test_cost_target_that_does_not_bind_changes_nothing() -> None:
    assert _ask(5, cost={"targetPerHour": "100"}).nominal == {NAME: "full"}


def test_cap_that_only_alerts_is_exceeded() -> None:
    capped = _decide(40, cost={"maxPerHour": "5"})
    alerted = _decide(40, cost={"maxPerHour": "5", "onCap": "Alert"})
    assert (capped.replicas, capped.limited_by) == (2, Reason.COST_CAP)
    assert alerted.replicas > 2


def test_forecast_orders_for_the_time_when_pods_are_ready() -> None:
    errors = {"last": (2.0,) * SCORED, "holt": (0.1,) * SCORED}
    rising = ForecastState(at_s=NOW_S, rate_per_s=5.0, trend_per_s=3.0, errors=errors)
    now, then = _ask(5), _ask(5, {NAME: rising})
    assert then.inputs["expected_per_s"] > 2 * now.inputs["expected_per_s"]
    assert now.up is not None
    assert then.up is not None
    assert then.up > now.up


def test_forecast_of_less_load_never_plans_below_the_load_there_is() -> None:
    errors = {"last": (2.0,) * SCORED, "holt": (0.1,) * SCORED}
    falling = ForecastState(at_s=NOW_S, rate_per_s=5.0, trend_per_s=-3.0, errors=errors)
    assert _ask(5, {NAME: falling}) == _ask(5)


def test_surprises_of_the_past_are_held_at_the_floors_and_a_larger_headroom_covers_them() -> None:
    """5/s need 0.89 replicas at full and 0.55 at the floor; once 30/s more came within a lead time: 35/s are 3.9."""
    known = {NAME: SurpriseState(seen=(Excess(30.0, 100),))}
    calm = _ask(5, scaling=_scaling(headroom="0.1"))
    wary = _ask(5, surprises=known, scaling=_scaling(headroom="0.1"))
    assert (calm.up, wary.up) == (1, 4)
    assert wary.inputs["need_burst"] == pytest.approx(3.90, abs=0.01)
    assert wary.down == 4
    assert wary.nominal == {NAME: "full"}
    small = {NAME: SurpriseState(seen=(Excess(1.0, 100),))}
    assert _ask(56, surprises=small).up == _ask(56).up


def test_headroom_that_is_set_learns_no_surprises() -> None:
    for headroom, learns in ((None, True), ("0.10", False)):
        policy = service_policy(scaling=_scaling(headroom=headroom))
        history = demand_of(policy, 5, NOW_S, seconds=100)
        _, state = replicas.decide(observation(NOW_S), history, policy, FULL_HISTORY)
        assert bool(state.surprises) is learns


def test_nothing_is_expected_before_the_long_window_is_full() -> None:
    policy = service_policy()
    _, state = replicas.decide(observation(NOW_S), demand_of(policy, 5, NOW_S, seconds=50), policy, FULL_HISTORY)
    assert state.surprises == {}


def test_forecast_that_is_switched_off_learns_nothing() -> None:
    policy = service_policy(scaling=_scaling(forecast={"method": "Off"}))
    _, state = replicas.decide(observation(NOW_S), demand_of(policy, 5, NOW_S), policy, FULL_HISTORY)
    assert state.forecasts == {}


def test_slow_loop_learns_the_rate_of_every_tick() -> None:
    policy = service_policy()
    _, state = replicas.decide(observation(NOW_S), demand_of(policy, 5, NOW_S), policy, FULL_HISTORY)
    assert state.forecasts[NAME].rate_per_s == pytest.approx(5.0)
    assert state.forecasts[NAME].pending[0].due_s == NOW_S + policy.loop.pod_ready_s


def test_grant_of_the_fleet_limits_and_is_named() -> None:
    policy = replace(service_policy(scaling=_scaling()), granted_replicas=2)
    history = replace(demand_of(policy, 40, NOW_S), since_s=0.0)
    plan, _ = replicas.decide(observation(NOW_S), history, policy, FULL_HISTORY)
    assert (plan.status, plan.replicas, plan.limited_by) == (Status.PROGRESS, 2, Reason.FLEET_QUOTA)


def test_plan_carries_its_inputs_and_the_best_alternative() -> None:
    plan = _decide(9, pods=3)
    assert plan.inputs["offered_per_s"] == pytest.approx(9.0)
    assert plan.rejected.startswith("2: ")
    assert plan.rejected in plan.message


class TestScaleToZero:
    SCALING: ClassVar = {"minReplicas": 0, "maxReplicas": 3, "idle": {"scaleToZero": "Enabled", "afterSeconds": 60}}

    def _run(self, per_s: int, pods: int, state: ReplicaState, now_s: float = NOW_S, **changes: Any) -> ReplicaPlan:
        policy = service_policy(scaling=self.SCALING)
        history = replace(demand_of(policy, per_s, now_s), since_s=0.0)
        return replicas.decide(observation(now_s, pods, **changes), history, policy, state)[0]

    def test_idle_service_is_put_to_zero(self) -> None:
        plan = self._run(0, 1, replace(FULL_HISTORY, idle_since_s=NOW_S - 60))
        assert (plan.status, plan.reason, plan.replicas) == (Status.PROGRESS, Reason.IDLE, 0)

    def test_service_that_has_not_been_idle_for_long_keeps_one(self) -> None:
        plan = self._run(0, 1, replace(FULL_HISTORY, idle_since_s=NOW_S - 59))
        assert (plan.status, plan.replicas) == (Status.HOLD, 1)

    def test_arrivals_end_idleness(self) -> None:
        policy = service_policy(scaling=self.SCALING)
        history = replace(demand_of(policy, 1, NOW_S), since_s=0.0)
        idle = replace(FULL_HISTORY, idle_since_s=0.0)
        plan, state = replicas.decide(observation(NOW_S), history, policy, idle)
        assert (plan.replicas, state.idle_since_s) == (1, None)

    def test_silent_pod_is_not_an_idle_one(self) -> None:
        pods = (pod("a"), pod("b", stale=True))
        policy = service_policy(scaling=self.SCALING)
        history = replace(demand_of(policy, 0, NOW_S), since_s=0.0)
        _, state = replicas.decide(observation(NOW_S, pods), history, policy, replace(FULL_HISTORY, idle_since_s=0.0))
        assert state.idle_since_s is None

    def test_sleeping_service_sleeps_until_it_is_woken(self) -> None:
        plan = self._run(0, 0, FULL_HISTORY, ordered_replicas=0)
        assert (plan.status, plan.reason, plan.replicas) == (Status.HOLD, Reason.IDLE, 0)
        assert "moeprism.io/wake" in plan.message
        plan = self._run(0, 0, FULL_HISTORY, ordered_replicas=0, woken_s=NOW_S - 1)
        assert (plan.status, plan.reason, plan.replicas) == (Status.PROGRESS, Reason.WOKEN, 1)

    def test_old_wish_wakes_nobody(self) -> None:
        assert self._run(0, 0, FULL_HISTORY, ordered_replicas=0, woken_s=NOW_S - 61).replicas == 0

    def test_schedule_wakes(self) -> None:
        office = {"name": "office", "start": "00:00", "end": "23:59", "minReplicas": 2}
        policy = service_policy(scaling={**self.SCALING, "schedules": [office]})
        seen = observation(NOW_S, 0, ordered_replicas=0, unix_s=36_000.0)
        plan, _ = replicas.decide(seen, demand_of(policy, 0, NOW_S), policy, FULL_HISTORY)
        assert (plan.status, plan.reason, plan.replicas) == (Status.PROGRESS, Reason.SCHEDULE, 2)

    def test_service_that_may_not_sleep_never_goes_to_zero(self) -> None:
        policy = service_policy()
        history = replace(demand_of(policy, 0, NOW_S), since_s=0.0)
        plan, _ = replicas.decide(observation(NOW_S), history, policy, replace(FULL_HISTORY, idle_since_s=0.0))
        assert plan.replicas == 1


class TestRehearsal:
    def _policy(self) -> Any:
        return service_policy(replace(service_policy().loop, rehearsal_s=60.0))

    def _tick(
        self,
        state: ReplicaState,
        now_s: float,
        away: tuple[str, ...] = (),
        tpot_ms: float = 50.0,
        point: str = "full",
        per_s: int = 3,
    ) -> tuple[ReplicaPlan, ReplicaState]:
        policy = self._policy()
        pods = tuple(pod(f"pod-{n}", point=point, serving=f"uid-pod-{n}" not in away) for n in range(3))
        history = replace(demand_of(policy, per_s, now_s, tpot_ms=tpot_ms), since_s=0.0)
        return replicas.decide(observation(now_s, pods), history, policy, state)

    def test_pod_leaves_traffic_before_it_is_given_up(self) -> None:
        plan, state = self._tick(FULL_HISTORY, NOW_S)
        assert (plan.reason, plan.replicas, len(plan.out_of_traffic)) == (Reason.REHEARSAL, 3, 1)
        away = plan.out_of_traffic
        plan, state = self._tick(state, NOW_S + 30, away)
        assert (plan.reason, plan.replicas, plan.out_of_traffic) == (Reason.REHEARSAL, 3, away)
        plan, state = self._tick(state, NOW_S + 60, away)
        assert (plan.status, plan.replicas, plan.out_of_traffic) == (Status.PROGRESS, 2, away)
        assert state.rehearsal is not None
        assert state.rehearsal.passed

    @pytest.mark.parametrize("trouble", [{"tpot_ms": 190.0}, {"point": "b875"}])
    def test_trouble_puts_the_pod_back_and_delays_the_next_rehearsal(self, trouble: dict[str, Any]) -> None:
        plan, state = self._tick(FULL_HISTORY, NOW_S)
        plan, state = self._tick(state, NOW_S + 30, plan.out_of_traffic, **trouble)
        assert (plan.reason, plan.replicas, plan.out_of_traffic) == (Reason.REHEARSAL_FAILED, 3, ())
        plan, state = self._tick(state, NOW_S + 330)
        assert plan.out_of_traffic == ()
        assert "failed less than 600 s ago, and the load needs as much as then" in plan.rejected
        plan, state = self._tick(state, NOW_S + 660)
        assert len(plan.out_of_traffic) == 1

    def test_load_that_needs_less_than_was_tried_is_rehearsed_again_at_once(self) -> None:
        """Two replicas were too few for 9 requests a second, which says nothing about 3, for which one is enough."""
        plan, state = self._tick(FULL_HISTORY, NOW_S, per_s=9)
        _, state = self._tick(state, NOW_S + 30, plan.out_of_traffic, tpot_ms=190.0, per_s=9)
        as_before, _ = self._tick(state, NOW_S + 330, per_s=9)
        less, _ = self._tick(state, NOW_S + 331, per_s=3)
        assert (as_before.out_of_traffic, len(less.out_of_traffic)) == ((), 1)

    @pytest.mark.parametrize("mode", ["paused", "advisory"])
    def test_pod_returns_to_traffic_when_somebody_takes_the_wheel(self, mode: str) -> None:
        plan, state = self._tick(FULL_HISTORY, NOW_S)
        pods = tuple(pod(f"pod-{n}", serving=f"uid-pod-{n}" not in plan.out_of_traffic) for n in range(3))
        policy = replace(self._policy(), **{mode: True})
        history = replace(demand_of(policy, 3, NOW_S + 30), since_s=0.0)
        plan, state = replicas.decide(observation(NOW_S + 30, pods), history, policy, state)
        assert (plan.out_of_traffic, state.rehearsal) == ((), None)

    def test_missed_objectives_fail_a_rehearsal_even_where_latencies_look_calm(self) -> None:
        seen = replace(delta(100), met=90, missed=10)
        policy = self._policy()
        history = replace(demand_of(policy, 3, NOW_S), since_s=0.0)
        history = demand.update(history, observation(NOW_S + 1, 3, classes={"interactive": seen}), policy)
        begun = Rehearsal("uid-pod-0", "pod-0", NOW_S - 30, kept=2)
        text = rehearsal.failure(observation(NOW_S + 1, 3), history, policy, begun, {"interactive": "full"})
        assert text is not None
        assert "attainment of 'interactive' fell to" in text

    def test_no_rehearsal_in_a_fleet_that_is_not_whole(self) -> None:
        policy = self._policy()
        history = replace(demand_of(policy, 3, NOW_S), since_s=0.0)
        pods = tuple(pod(f"pod-{n}", stale=n == 0) for n in range(3))
        for seen in (observation(NOW_S, pods), observation(NOW_S, 3, rollout=True)):
            plan, _ = replicas.decide(seen, history, policy, FULL_HISTORY)
            assert (plan.replicas, plan.out_of_traffic) == (3, ())
            assert plan.rejected

    def test_pod_with_the_fewest_requests_goes(self) -> None:
        pods = (pod("a", load=load(running=2)), pod("b", load=load(running=1)), pod("c", load=load(running=2)))
        assert rehearsal.victim(observation(NOW_S, pods)).name == "b"


def _hot(point: str, ttft_ms: float, ready_s: float = 0.0, **spec: Any) -> Ask:
    """Two pods, five requests a second: 0.9 replicas by the profile; 1,500 ms are promised."""
    policy = service_policy(**{"scaling": _scaling(headroom="0.1"), **spec})
    seen = {NAME: delta(5, ttft_ms=ttft_ms, point=point)}
    state = demand.DemandState()
    pods = tuple(pod(f"pod-{n}", ready_s=ready_s) for n in range(2))
    for tick in range(61):
        now_s = NOW_S - 60 + tick
        state = demand.update(state, observation(now_s, pods, classes=seen), policy)
    return need.ask(observation(NOW_S, pods), state, policy, {}, {}, READY_S)


def test_pool_that_is_hot_at_lowered_points_asks_for_a_pod_whatever_the_profile_says() -> None:
    asked = _hot("b500", ttft_ms=1400)
    assert (asked.up, asked.down) == (3, 3)
    assert "profile does not explain" in asked.message
    assert asked.asked is not None
    assert asked.asked.at_once == 3


@pytest.mark.parametrize(
    "calm",
    [
        {"point": "full", "ttft_ms": 1400},
        {"point": "b500", "ttft_ms": 500},
        {"point": "b500", "ttft_ms": 1400, "ready_s": NOW_S - 30},
        {"point": "b500", "ttft_ms": 1400, "budget": {"control": "Off"}},
    ],
    ids=["at the top", "not hot", "a pod is new", "the budget may not move"],
)
def test_pool_is_believed_to_be_what_its_profile_says_while(calm: dict[str, Any]) -> None:
    assert _hot(**calm).up == 1
