"""Differences of a pod's cumulative counters: nothing counts twice, a lost poll loses nothing, a restart starts at 0.

Counters are cumulative since the process's `startId`. The first report of a process that this operator knows nothing
about is a baseline and counts nothing: most of it happened before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_api.control import ClassCounters, Report
from prism_operator.plan.types import ClassDelta


class CountersWentBack(Exception):
    """A counter fell although the process is the same: the pod lies or is broken, its numbers cannot be used."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Counters of a process as last seen."""

    start_id: str
    classes: Mapping[str, ClassCounters] = field(default_factory=dict)


def baseline_of(report: Report) -> Baseline:
    return Baseline(report.start_id, {counters.name: counters for counters in report.classes})


def differences(before: Baseline, report: Report) -> dict[str, ClassDelta]:
    """What each class of the report grew by. Raises CountersWentBack."""
    known = before.classes if before.start_id == report.start_id else {}
    return {counters.name: _difference(known.get(counters.name), counters) for counters in report.classes}


def _difference(before: ClassCounters | None, after: ClassCounters) -> ClassDelta:
    zero = before or ClassCounters(name=after.name)

    def grown(name: str) -> int:
        return _grown(after.name, name, getattr(zero, name), getattr(after, name))

    def histogram(name: str) -> tuple[int, ...]:
        pairs = zip(getattr(zero, name), getattr(after, name), strict=True)
        counts = tuple(_grown(after.name, name, old, new) for old, new in pairs)
        # Most ticks of most classes count nothing, and the planner remembers hundreds of them.
        return counts if any(counts) else ()

    points = after.tokens_by_point.keys() | zero.tokens_by_point.keys()
    return ClassDelta(
        arrived=grown("arrived"),
        finished=grown("finished"),
        met=grown("met"),
        missed=grown("missed"),
        shed=grown("shed"),
        cancelled=grown("cancelled"),
        prompt_tokens=grown("prompt_tokens"),
        output_tokens=grown("output_tokens"),
        in_out=histogram("in_out"),
        ttft=histogram("ttft"),
        tpot=histogram("tpot"),
        tokens_by_point={
            point: _grown(
                after.name,
                f"tokensByPoint.{point}",
                zero.tokens_by_point.get(point, 0),
                after.tokens_by_point.get(point, 0),
            )
            for point in points
        },
    )


def _grown(class_name: str, counter: str, old: int, new: int) -> int:
    if new < old:
        raise CountersWentBack(f"counter '{counter}' of class '{class_name}' fell from {old} to {new}")
    return new - old
