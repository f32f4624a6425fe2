"""By how much a load came to exceed what was expected of it, before an order of replicas could have helped.

The time from noticing a load until a pod that is ordered for it is ready, the lead time, can be bridged only by what is
there. How much must be there is a matter of experience: every tick of the slow loop writes down what is expected, and
one lead time later, when an order of that tick would have arrived, by how much the peak of what comes then exceeds it.
What is kept ready is enough for the expected load plus the excess that covers the class's attainment target: of all
requests seen, that share came with no larger one. It is the safety stock of an inventory, which is sized by the
forecast's error over the lead time.

A steady load teaches that nothing is needed, one that jumps in steps a step, one of bursts a burst, without a setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass

REMEMBERED = 240
"""Ticks that count: two hours. Of much fewer a target of 99 % would always mean the largest excess."""
PENDING_MOST = 64
"""Lead times that run at once. With as many running no more are begun, so that each of them ends."""


@dataclass(frozen=True, slots=True)
class Lead:
    """What was expected one lead time before `due_s`."""

    due_s: float
    expected_per_s: float


@dataclass(frozen=True, slots=True)
class Excess:
    """What a tick taught; `arrivals` is its weight."""

    per_s: float
    arrivals: int


@dataclass(frozen=True, slots=True)
class SurpriseState:
    """Memory of one class's surprises; bounded, plain values. The first of `running` may be over: it counts until the
    next one is."""

    at_s: float | None = None
    running: tuple[Lead, ...] = ()
    seen: tuple[Excess, ...] = ()


def update(
    state: SurpriseState, now_s: float, expected_per_s: float, peak_per_s: float, arrivals: int, lead_s: float
) -> SurpriseState:
    """Learn from the peak and the arrivals since the last tick, and write down what is expected now.

    Equal or earlier `now_s` changes nothing.
    """
    if state.at_s is not None and now_s <= state.at_s:
        return state
    over = [one for one in state.running if one.due_s <= now_s][-1:]
    excess = [Excess(max(0.0, peak_per_s - one.expected_per_s), arrivals) for one in over]
    running = [*over, *(one for one in state.running if one.due_s > now_s)]
    if len(running) < PENDING_MOST:
        running.append(Lead(now_s + lead_s, expected_per_s))
    return SurpriseState(now_s, tuple(running), (*state.seen, *excess)[-REMEMBERED:])


def reserve_per_s(state: SurpriseState, share: float) -> float:
    """Excess that `share` of the requests seen had to do with at most; 0 before anything was seen."""
    needed = share * sum(one.arrivals for one in state.seen)
    covered = 0
    for one in sorted(state.seen, key=lambda one: one.per_s):
        covered += one.arrivals
        if covered >= needed:
            return one.per_s
    return 0.0


def of(states: Mapping[str, SurpriseState], name: str) -> SurpriseState:
    """The memory of a class; empty for one that was never seen."""
    return states.get(name, SurpriseState())
