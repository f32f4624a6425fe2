"""How fast a count may move: the scaling policies of autoscaling/v2, over the moves that were ordered lately.

    start    count at the beginning of a policy's period: the count now, less what was added, plus what was removed
    change   what the policy allows in its period: a number of replicas, or a share of the start, rounded up
    room     how far the count may still go from where it is: to the start and the change beyond it

As the HPA has it (Kubernetes documentation, "Horizontal Pod Autoscaling", scaling policies): of several policies the
one that allows the largest change counts, unless `selectPolicy` says otherwise.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prism_api.scaling import Direction, PolicyType, ScalingPolicy, SelectPolicy

LONGEST_PERIOD_S = 1800.0
UP, DOWN = 1, -1


@dataclass(frozen=True, slots=True)
class Move:
    """A count that was ordered; `by` is negative on the way down."""

    at_s: float
    by: int


def remembered(moves: Iterable[Move], now_s: float) -> tuple[Move, ...]:
    """Those that a policy may still ask for."""
    return tuple(move for move in moves if now_s - move.at_s < LONGEST_PERIOD_S)


def room(pace: Direction, way: int, ordered: int, moves: Sequence[Move], now_s: float) -> int | None:
    """Replicas that may be added (`UP`) or removed (`DOWN`) now; None where nothing limits that."""
    if pace.select_policy is SelectPolicy.DISABLED:
        return 0
    rooms = [_room(policy, way, ordered, moves, now_s) for policy in pace.policies]
    if not rooms:
        return None
    return max(0, min(rooms) if pace.select_policy is SelectPolicy.MIN else max(rooms))


def _room(policy: ScalingPolicy, way: int, ordered: int, moves: Sequence[Move], now_s: float) -> int:
    moved = sum(move.by for move in moves if now_s - move.at_s < policy.period_seconds)
    change = policy.value if policy.type is PolicyType.PODS else math.ceil((ordered - moved) * policy.value / 100)
    return change - way * moved
