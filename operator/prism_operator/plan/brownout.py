"""Which class gives up quality first, and which gets it back first.

    LowestPriorityFirst   down: the lowest priority to its floor, then the next; up: in reverse
    MarginalQuality       down: the (class, step) that gives up the least quality for the capacity it gains, where
                          quality is the class's rate times the relative quality of the two points; up: the step that
                          returns the most

Classes without load do not sink, for it would buy nothing.
"""

import math
from collections.abc import Iterator

from prism_api.service import Brownout
from prism_operator.plan.pressure import Pressure
from prism_operator.plan.types import ClassPolicy, ServicePolicy

Points = dict[str, str]


def by_priority(policy: ServicePolicy) -> list[ClassPolicy]:
    """Lowest first; of equal ones the one named last in the spec."""
    return [p for _, p in sorted(enumerate(policy.classes), key=lambda item: (item[1].priority, -item[0]))]


def steps_down(policy: ServicePolicy, pressure: Pressure, points: Points) -> Iterator[Points]:
    """Every combination on the way down, one step each, until each class with load is at its floor."""
    ladder, current = policy.ladder, dict(points)
    idle = {name for name, rate in pressure.rates.items() if rate == 0.0 and pressure.saturation[name] is None}
    sinking = [p for p in by_priority(policy) if p.name not in idle]
    while open_ones := [p for p in sinking if ladder.index(current[p.name]) > ladder.index(p.floor)]:
        if policy.brownout is Brownout.LOWEST_PRIORITY_FIRST:
            chosen = open_ones[0]
        else:
            chosen = min(open_ones, key=lambda p: _price(policy, pressure, current, p.name, -1))
        below = ladder.points[ladder.index(current[chosen.name]) - 1].name
        current = {**current, chosen.name: below}
        yield current


def next_up(policy: ServicePolicy, pressure: Pressure, points: Points) -> ClassPolicy | None:
    """The class that rises next; None if all are at their top."""
    below = [p for p in reversed(by_priority(policy)) if points[p.name] != policy.max_point]
    if not below or policy.brownout is Brownout.LOWEST_PRIORITY_FIRST:
        return below[0] if below else None
    return max(below, key=lambda p: _price(policy, pressure, points, p.name, +1))


def _price(policy: ServicePolicy, pressure: Pressure, points: Points, name: str, step: int) -> float:
    """Quality a second that one step moves, for each replica's worth of capacity that it moves.

    Without a profile the budget stands for the capacity, the most it can be. A step that frees nothing has no price
    that is worth paying; one that costs nothing returns quality for free.
    """
    ladder, at = policy.ladder, policy.ladder.index(points[name])
    here, there = ladder.points[at], ladder.points[at + step]
    quality = (pressure.rates[name] or 0.0) * float(abs(there.relative_quality - here.relative_quality))
    before, after = pressure.need(points), pressure.need({**points, name: there.name})
    if before is None or after is None or math.isinf(before) or math.isinf(after):
        return quality / abs(there.budget_permille - here.budget_permille)
    moved = abs(after - before)
    return quality / moved if moved > 0 else math.inf
