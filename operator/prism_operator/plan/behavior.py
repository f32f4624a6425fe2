"""How fast a count may move: the scaling policies of autoscaling/v2, over the moves that were ordered lately.

    added, removed   replicas ordered more and fewer within the policy's period
    start            count at the beginning of the period: now - added + removed
    up               start + value, or start * (1 + value/100), rounded up
    down             start - value, or start * (1 - value/100), rounded down

As the HPA has it (Kubernetes documentation, "Horizontal Pod Autoscaling", scaling policies): of several policies the
one that allows the largest change counts, unless `selectPolicy` says otherwise.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prism_api.effective import ScalingRules
from prism_api.scaling import PolicyType, SelectPolicy

LONGEST_PERIOD_S = 1800.0


@dataclass(frozen=True, slots=True)
class Move:
    """A count that was ordered; `by` is negative on the way down."""

    at_s: float
    by: int


def remembered(moves: Iterable[Move], now_s: float) -> tuple[Move, ...]:
    """Those that a policy may still ask for."""
    return tuple(move for move in moves if now_s - move.at_s < LONGEST_PERIOD_S)


def most(rules: ScalingRules, ordered: int, moves: Sequence[Move], now_s: float) -> int | None:
    """Most replicas that may be ordered now; None where nothing limits the way up."""
    if rules.select is SelectPolicy.DISABLED:
        return ordered
    found = []
    for rule in rules.policies:
        start = _start(rule.period_s, ordered, moves, now_s)
        found.append(start + rule.value if rule.type is PolicyType.PODS else math.ceil(start * (1 + rule.value / 100)))
    if not found:
        return None
    return max(ordered, min(found) if rules.select is SelectPolicy.MIN else max(found))


def least(rules: ScalingRules, ordered: int, moves: Sequence[Move], now_s: float) -> int | None:
    """Fewest replicas that may be ordered now; None where nothing limits the way down."""
    if rules.select is SelectPolicy.DISABLED:
        return ordered
    found = []
    for rule in rules.policies:
        start = _start(rule.period_s, ordered, moves, now_s)
        found.append(start - rule.value if rule.type is PolicyType.PODS else math.floor(start * (1 - rule.value / 100)))
    if not found:
        return None
    return min(ordered, max(found) if rules.select is SelectPolicy.MIN else min(found))


def _start(period_s: float, ordered: int, moves: Sequence[Move], now_s: float) -> int:
    return ordered - sum(move.by for move in moves if now_s - move.at_s < period_s)
