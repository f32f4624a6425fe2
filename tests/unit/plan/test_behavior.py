"""Scaling policies as autoscaling/v2 has them, and what the slow loop makes of them."""

from dataclasses import replace
from typing import Any

import pytest

from prism_api.scaling import Direction, PolicyType, ScalingPolicy, SelectPolicy
from prism_operator.plan import behavior, replicas
from prism_operator.plan.behavior import Move
from prism_operator.plan.types import Reason, ReplicaPlan, ReplicaState, ServicePolicy, Status
from tests.unit.plan.factories import demand_of, observation, service_policy

NOW_S = 10_000.0
PODS_2 = ScalingPolicy(type=PolicyType.PODS, value=2, period_seconds=60)
HALF = ScalingPolicy(type=PolicyType.PERCENT, value=50, period_seconds=60)


def rules(*policies: ScalingPolicy, select: SelectPolicy | None = None) -> Direction:
    return Direction(policies=list(policies), select_policy=select)


@pytest.mark.parametrize(
    ("given", "moves", "most", "least"),
    [
        (rules(), (), None, None),
        (rules(PODS_2), (), 12, 8),
        (rules(HALF), (), 15, 5),
        (rules(PODS_2, HALF), (), 15, 5),
        (rules(PODS_2, HALF, select=SelectPolicy.MIN), (), 12, 8),
        (rules(PODS_2, select=SelectPolicy.DISABLED), (), 10, 10),
        (rules(select=SelectPolicy.DISABLED), (), 10, 10),
        (rules(PODS_2), (Move(NOW_S - 59, 2),), 10, 6),
        (rules(PODS_2), (Move(NOW_S - 60, 2),), 12, 8),
        (rules(PODS_2), (Move(NOW_S - 50, -1), Move(NOW_S - 10, -1)), 14, 10),
        (rules(HALF), (Move(NOW_S - 10, 2),), 12, 4),
        (rules(PODS_2), (Move(NOW_S - 10, 5),), 10, 3),
    ],
)
def test_a_count_of_ten_may_move_as_far_as_the_policies_allow_from_where_their_period_began(
    given: Direction, moves: tuple[Move, ...], most: int | None, least: int | None
) -> None:
    up, down = (behavior.room(given, way, 10, moves, NOW_S) for way in (behavior.UP, behavior.DOWN))
    assert (None if up is None else 10 + up, None if down is None else 10 - down) == (most, least)


def test_moves_are_forgotten_after_the_longest_period() -> None:
    kept = Move(NOW_S - behavior.LONGEST_PERIOD_S + 1, 1)
    assert behavior.remembered((Move(NOW_S - behavior.LONGEST_PERIOD_S, 1), kept), NOW_S) == (kept,)


def policy_with(**behaviors: Any) -> ServicePolicy:
    return service_policy(scaling={"minReplicas": 1, "maxReplicas": 20, "maxStep": 8, "behavior": behaviors})


def decide(
    per_s: int, pods: int, policy: ServicePolicy, now_s: float, state: ReplicaState | None = None
) -> tuple[ReplicaPlan, ReplicaState]:
    history = replace(demand_of(policy, per_s, now_s), since_s=0.0)
    return replicas.decide(observation(now_s, pods), history, policy, state or ReplicaState(since_s=0.0))


def test_a_scale_up_goes_as_far_as_its_policy_and_on_when_the_period_is_over() -> None:
    per_minute = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}
    policy = policy_with(scaleUp=per_minute)
    plan, state = decide(60, 2, policy, NOW_S)
    assert (plan.replicas, plan.status, plan.limited_by) == (4, Status.PROGRESS, Reason.STEP_CAP)
    plan, state = decide(60, 4, policy, NOW_S + 30, state)
    assert (plan.replicas, plan.status, plan.reason) == (4, Status.BLOCKED, Reason.STEP_CAP)
    assert "scaleUp" in plan.rejected
    assert decide(60, 4, policy, NOW_S + 60, state)[0].replicas == 6


def test_the_built_in_pace_down_is_one_replica_in_two_minutes_and_a_policy_takes_its_place() -> None:
    def downs(policy: ServicePolicy) -> list[int]:
        state, pods, counts = ReplicaState(since_s=0.0), 6, []
        for tick in range(8):
            plan, state = decide(1, pods, policy, NOW_S + 30 * tick, state)
            pods = plan.replicas
            counts.append(pods)
        return counts

    fast = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 120}]}
    assert downs(policy_with(scaleDown={"stabilizationWindowSeconds": 0})) == [5, 5, 5, 5, 4, 4, 4, 4]
    assert downs(policy_with(scaleDown=fast)) == [5, 4, 4, 4, 3, 2, 2, 2]


def test_a_direction_that_is_disabled_is_not_taken_but_new_bounds_are_kept() -> None:
    disabled = policy_with(scaleDown={"stabilizationWindowSeconds": 0, "selectPolicy": "Disabled"})
    plan, _ = decide(1, 6, disabled, NOW_S)
    assert plan.replicas == 6
    assert "scaleDown" in plan.rejected
    assert decide(1, 6, replace(disabled, max_replicas=4), NOW_S)[0].replicas == 4
