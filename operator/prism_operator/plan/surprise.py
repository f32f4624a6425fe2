"""By how much a load came to exceed what was expected of it, before an order of replicas could have helped.

The time from noticing a load until a pod that is ordered for it is ready, the lead time, can be bridged only by what is
there. How much must be there is a matter of experience: every tick of the slow loop writes down what is expected and,
one lead time later, by how much the peak in between exceeded it. What is kept ready is enough for the expected load
plus the excess that covers the class's attainment target: of all requests seen, that share arrived in lead times whose
excess was no larger. It is the safety stock of an inventory, which is sized by the forecast's error over the lead time.

A steady load teaches that nothing is needed, one that jumps in steps a step, one of bursts a burst, without a setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

REMEMBERED = 50
"""Lead times that count: 25 minutes of ticks."""
PENDING_MOST = 64
"""Lead times that run at once. With as many running no more are begun, so that each of them ends."""


@dataclass(frozen=True, slots=True)
class Lead:
    """A lead time that runs until `due_s`: what was expected at its start, and what came so far."""

    due_s: float
    expected_per_s: float
    peak_per_s: float = 0.0
    arrivals: int = 0


@dataclass(frozen=True, slots=True)
class Excess:
    """What a lead time that is over taught; `arrivals` is its weight."""

    per_s: float
    arrivals: int


@dataclass(frozen=True, slots=True)
class SurpriseState:
    """Memory of one class's surprises; bounded, plain values."""

    at_s: float | None = None
    running: tuple[Lead, ...] = ()
    ended: tuple[Excess, ...] = ()


def update(
    state: SurpriseState, now_s: float, expected_per_s: float, peak_per_s: float, arrivals: int, lead_s: float
) -> SurpriseState:
    """Learn what pressed since the last tick, and begin one more lead time with what is expected now.

    Equal or earlier `now_s` changes nothing.
    """
    if state.at_s is not None and now_s <= state.at_s:
        return state
    grown = [
        replace(one, peak_per_s=max(one.peak_per_s, peak_per_s), arrivals=one.arrivals + arrivals)
        for one in state.running
    ]
    over = [Excess(max(0.0, one.peak_per_s - one.expected_per_s), one.arrivals) for one in grown if one.due_s <= now_s]
    running = [one for one in grown if one.due_s > now_s]
    if len(running) < PENDING_MOST:
        running.append(Lead(now_s + lead_s, expected_per_s))
    return SurpriseState(now_s, tuple(running), (*state.ended, *over)[-REMEMBERED:])


def reserve_per_s(state: SurpriseState, share: float) -> float:
    """Excess that `share` of the requests seen had to do with at most; 0 before anything was seen."""
    needed = share * sum(one.arrivals for one in state.ended)
    seen = 0
    for one in sorted(state.ended, key=lambda one: one.per_s):
        seen += one.arrivals
        if seen >= needed:
            return one.per_s
    return 0.0


def of(states: Mapping[str, SurpriseState], name: str) -> SurpriseState:
    """The memory of a class; empty for one that was never seen."""
    return states.get(name, SurpriseState())
