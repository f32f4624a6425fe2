"""Counts every request once: arrived, then exactly one of met, missed, shed or cancelled (api contract 7 to 9).

Counters are cumulative since the process started and are keyed by class name, so they survive a change of classes.
Single-threaded: only the event loop writes.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prism_api.control import ClassCounters, histogram_bucket, in_out_cell
from prism_api.points import Ladder
from prism_runtime.engine.governor import ClassTable, ServiceClass

RECENT_S = 60
"""Window of the realised budget and quality of a class: long enough to be smooth, short enough to show a burst."""


class Outcome(StrEnum):
    MET = "met"
    MISSED = "missed"
    SHED = "shed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Passage:
    """One request's way through the pod. Its class and objectives are those of its arrival: what it was promised."""

    service_class: ServiceClass
    prompt_tokens: int
    arrived_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0

    def token(self, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.output_tokens += 1

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None for answers of one token."""
        if self.output_tokens < 2 or self.first_token_s is None or self.last_token_s is None:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    def broke_objective(self, now_s: float) -> bool:
        """True once an objective is broken: too late already, or too slow on average so far."""
        promised, waited_s, tpot_s = self.service_class, self.ttft_s, self.tpot_s
        if waited_s is None:
            waited_s = now_s - self.arrived_s
        if promised.ttft_s is not None and waited_s > promised.ttft_s:
            return True
        return promised.tpot_s is not None and tpot_s is not None and tpot_s > promised.tpot_s


@dataclass(slots=True)
class ClassTotals:
    arrived: int = 0
    finished: int = 0
    met: int = 0
    missed: int = 0
    shed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: list[int] = field(default_factory=lambda: [0] * 48)
    tpot: list[int] = field(default_factory=lambda: [0] * 48)
    in_out: list[int] = field(default_factory=lambda: [0] * 16)
    tokens_by_point: dict[str, int] = field(default_factory=dict)
    recent: deque[list[int]] = field(default_factory=deque)
    """[second, point, tokens], newest last; at most RECENT_S seconds of them."""

    def snapshot(self, name: str) -> ClassCounters:
        return ClassCounters(
            name=name,
            arrived=self.arrived,
            finished=self.finished,
            met=self.met,
            missed=self.missed,
            shed=self.shed,
            cancelled=self.cancelled,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft=list(self.ttft),
            tpot=list(self.tpot),
            in_out=list(self.in_out),
            tokens_by_point=dict(self.tokens_by_point),
        )


class Accounting:
    """Totals of every class this pod has served."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.totals: dict[str, ClassTotals] = {}

    def follow(self, table: ClassTable) -> None:
        """Open an account for every live class; close those of classes that no longer hold a row of the plan.

        Bounds the number of accounts (and of metric labels) by that of the plan's rows.
        """
        for name in table.live:
            self.totals.setdefault(name, ClassTotals())
        for name in self.totals.keys() - table.live.keys() - table.retired.keys():
            del self.totals[name]

    def _of(self, service_class: ServiceClass) -> ClassTotals:
        return self.totals.setdefault(service_class.name, ClassTotals())

    def arrived(self, service_class: ServiceClass, prompt_tokens: int, now_s: float) -> Passage:
        totals = self._of(service_class)
        totals.arrived += 1
        totals.prompt_tokens += prompt_tokens
        return Passage(service_class, prompt_tokens, now_s)

    def shed(self, service_class: ServiceClass) -> None:
        totals = self._of(service_class)
        totals.arrived += 1
        totals.shed += 1

    def token(self, passage: Passage, point: int, now_s: float) -> None:
        totals, name = self._of(passage.service_class), self.ladder.points[point].name
        passage.token(now_s)
        totals.output_tokens += 1
        totals.tokens_by_point[name] = totals.tokens_by_point.get(name, 0) + 1
        second = int(now_s)
        if totals.recent and totals.recent[-1][:2] == [second, point]:
            totals.recent[-1][2] += 1
        else:
            totals.recent.append([second, point, 1])
        _forget_old(totals.recent, now_s)

    def finished(self, passage: Passage, now_s: float) -> Outcome:
        """A whole answer: met or missed, exactly, and into the histograms."""
        totals = self._of(passage.service_class)
        totals.finished += 1
        totals.in_out[in_out_cell(passage.prompt_tokens, passage.output_tokens)] += 1
        if passage.ttft_s is not None:
            totals.ttft[histogram_bucket(passage.ttft_s * 1000)] += 1
        if passage.tpot_s is not None:
            totals.tpot[histogram_bucket(passage.tpot_s * 1000)] += 1
        if passage.broke_objective(now_s):
            totals.missed += 1
            return Outcome.MISSED
        totals.met += 1
        return Outcome.MET

    def failed(self, passage: Passage) -> Outcome:
        self._of(passage.service_class).missed += 1
        return Outcome.MISSED

    def cancelled(self, passage: Passage, now_s: float) -> Outcome:
        """Gone before we broke a promise: nobody's fault. Gone after: the client gave up on a missed objective."""
        totals = self._of(passage.service_class)
        if passage.broke_objective(now_s):
            totals.missed += 1
            return Outcome.MISSED
        totals.cancelled += 1
        return Outcome.CANCELLED

    def snapshot(self) -> list[ClassCounters]:
        return [totals.snapshot(name) for name, totals in sorted(self.totals.items())]

    def recent_share(self, name: str, now_s: float, weights: Mapping[int, float], otherwise: float) -> float:
        """Token-weighted mean of `weights` (by ladder index) over the last minute; `otherwise` without tokens."""
        recent = self.totals[name].recent if name in self.totals else deque()
        _forget_old(recent, now_s)
        tokens = sum(entry[2] for entry in recent)
        if tokens == 0:
            return otherwise
        return sum(weights[point] * count for _, point, count in recent) / tokens


def _forget_old(recent: deque[list[int]], now_s: float) -> None:
    while recent and recent[0][0] < now_s - RECENT_S:
        recent.popleft()
