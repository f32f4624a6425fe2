"""Who shares a step, and at which operating points: ours, and two baselines to compare with.

A policy decides nothing about memory. It is asked once a step how to arrange it, and whenever there is room who starts.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from heapq import nsmallest
from math import ceil, inf

from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.sequence import Sequence

PointOf = Callable[[Sequence], int]
Priced = Iterable[tuple[Sequence, int]]
"""Sequences, each with how many prompt tokens of it are read."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a policy decides on.

    decoding, reading  running sequences that have read their prompts, and that have not
    waiting            the others
    free               how many more could run
    top                the operating point that a sequence's class stands at
    most_read          prompt tokens that a step may read
    """

    now_s: float
    decoding: Items[Sequence]
    reading: Items[Sequence]
    waiting: Collection[Sequence]
    free: int
    top: PointOf
    most_read: int


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One step: which of the decoding sequences run, how many prompt tokens may be read, and everybody's point.

    A sequence of which `reads` is false reads nothing of its prompt in this step and does not start. `floor_s` is what
    the step would take with everybody at the lowest point that they may run at; None if the policy does not know.
    """

    decode: Items[Sequence]
    most_read: int
    point_of: PointOf
    reads: Callable[[Sequence], bool] = lambda sequence: True
    floor_s: float | None = None


class Policy(ABC):
    """How steps are arranged. `costs` learn between steps."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs

    def first(self, waiting: Collection[Sequence], now_s: float, starts: int) -> Sequence:
        """Who of the waiting (at least one) starts next; nobody else does before. `starts` is how many have so far."""
        return min(waiting, key=lambda sequence: sequence.rank)

    @abstractmethod
    def arrange(self, outlook: Outlook) -> Arrangement: ...

    def _seconds(self, decode: Items[Sequence], read: Priced, point_of: PointOf) -> float:
        points, tokens = Counter(map(point_of, decode)), Counter[int]()
        for sequence, count in read:
            tokens[point_of(sequence)] += count
        return self.costs.seconds(points, sum(sequence.cached for sequence in decode), tokens)


def deadline_s(sequence: Sequence) -> float:
    """Until when the next token keeps the promise: of the first one, or of the mean time of those after it."""
    promise = sequence.request.promise
    if sequence.first_token_s is None:
        return inf if promise.ttft_s is None else sequence.arrived_s + promise.ttft_s
    return inf if promise.tpot_s is None else sequence.first_token_s + promise.tpot_s * sequence.generated


def floor_of(sequence: Sequence, top: int) -> int:
    """The lowest point that a request may run at, where its class stands at `top`."""
    floor = sequence.request.promise.floor
    return top if floor is None else min(floor, top)


class Slack(Policy):
    """Everybody who decodes runs in every step, each at a point of its own: where its class stands while every next
    token comes in time, else lower, down to its request's floor, the lowest priorities first.

    If floors do not make a step fit, it reads fewer prompt tokens, but never none. Requests whose first token can still
    be in time start before those of the same priority that are late already; one start in `FAIR` goes by rank alone, so
    that to be late is not to be forgotten. Without costs nothing is foreseen, and nothing is lowered.
    """

    FAIR = 8
    AHEAD = 32
    """Waiting requests that are looked at: those behind them are helped by whatever helps these."""
    LEAST_READ_SHARE = 8
    SHORTEST_TPOT_SHARE = 0.5
    """Of a sequence that is behind, what a step may still take of its objective: time is made up over several steps."""

    def first(self, waiting: Collection[Sequence], now_s: float, starts: int) -> Sequence:
        if starts % self.FAIR == self.FAIR - 1:
            return super().first(waiting, now_s, starts)
        return min(waiting, key=lambda sequence: self._urgency(sequence, now_s))

    def _urgency(self, sequence: Sequence, now_s: float) -> tuple[int, bool, float, int]:
        """Sorts by priority, then the still punctual, then by deadline, then by arrival."""
        due_s = deadline_s(sequence)
        late = due_s < now_s
        if self.costs.known and now_s <= due_s < inf:
            alone_s = self.costs.reading_seconds(sequence.request.promise.floor or 0, sequence.unread)
            late = due_s < now_s + alone_s
        return (sequence.rank[0], late, due_s, sequence.rank[1])

    def arrange(self, outlook: Outlook) -> Arrangement:
        decode, most = outlook.decoding, outlook.most_read
        if not self.costs.known:
            return Arrangement(decode, most, outlook.top)
        waiting = nsmallest(self.AHEAD, outlook.waiting, key=lambda one: self._urgency(one, outlook.now_s))
        queue = [*outlook.reading, *waiting]
        read = list(_cut(queue, most))
        lowering = _Lowering([*decode, *queue], outlook.top)
        in_time_s = min((self._left_s(sequence, outlook.now_s) for sequence in decode), default=inf)
        allowed_s = min(in_time_s, _pace_of_queue(outlook, queue))
        level = bisect_left(
            range(lowering.levels),
            True,
            key=lambda level: self._seconds(decode, read, lowering.at(level)) <= allowed_s,
        )
        point_of = lowering.at(level)
        whole_s, bare_s = self._seconds(decode, read, point_of), self._seconds(decode, (), point_of)
        if decode and whole_s > in_time_s:
            share = max(0.0, in_time_s - bare_s) / (whole_s - bare_s) if whole_s > bare_s else 1.0
            most = max(-(-most // self.LEAST_READ_SHARE), int(share * sum(count for _, count in read)))
        return Arrangement(decode, most, point_of, floor_s=self._seconds(decode, read, lowering.at(lowering.levels)))

    def _left_s(self, sequence: Sequence, now_s: float) -> float:
        tpot_s = sequence.request.promise.tpot_s
        return inf if tpot_s is None else max(deadline_s(sequence) - now_s, self.SHORTEST_TPOT_SHARE * tpot_s)


def _cut(queue: Iterable[Sequence], most: int) -> Iterable[tuple[Sequence, int]]:
    """What a step reads of a queue."""
    for sequence in queue:
        if most <= 0:
            return
        yield sequence, min(most, sequence.unread)
        most -= sequence.unread


def _pace_of_queue(outlook: Outlook, queue: Items[Sequence]) -> float:
    """The longest step with which every first token that can still be in time will be.

    A sequence waits until those before it are read, and until so many others have ended that it can run.
    """
    ends = sorted(one.request.sampling.max_tokens - one.generated for one in outlook.decoding)
    pace_s, tokens = inf, 0
    for place, sequence in enumerate(queue):
        tokens += sequence.unread
        left_s = deadline_s(sequence) - outlook.now_s
        if sequence.first_token_s is not None or left_s <= 0:
            continue
        behind = place - len(outlook.reading) - outlook.free
        freed = ends[min(behind, len(ends) - 1)] if behind >= 0 and ends else 0
        pace_s = min(pace_s, left_s / (freed + ceil(tokens / outlook.most_read)))
    return pace_s


class _Lowering:
    """Points by level: at 0 everybody stands at the top, at the last level at the floor. A level lowers one group by
    one point: the lowest priorities first, and of one priority those first whose promise is broken already."""

    def __init__(self, sequences: Iterable[Sequence], top: PointOf) -> None:
        self._top = top
        depth: dict[tuple[int, bool], int] = {}
        for sequence in sequences:
            key, point = self._group(sequence), top(sequence)
            depth[key] = max(depth.get(key, 0), point - floor_of(sequence, point))
        self._begins: dict[tuple[int, bool], int] = {}
        self.levels = 0
        for key in sorted(depth):
            self._begins[key] = self.levels
            self.levels += depth[key]

    @staticmethod
    def _group(sequence: Sequence) -> tuple[int, bool]:
        promise, first_s = sequence.request.promise, sequence.first_token_s
        kept = promise.ttft_s is None or first_s is None or first_s - sequence.arrived_s <= promise.ttft_s
        return (sequence.request.priority, kept)

    def at(self, level: int) -> PointOf:
        def point_of(sequence: Sequence) -> int:
            top = self._top(sequence)
            lowered = max(0, level - self._begins.get(self._group(sequence), level))
            return max(floor_of(sequence, top), top - lowered)

        return point_of


class Fifo(Policy):
    """In order of arrival, everybody at the highest point that anybody stands at: what an engine with one budget a step
    has to do."""

    def first(self, waiting: Collection[Sequence], now_s: float, starts: int) -> Sequence:
        return min(waiting, key=lambda sequence: sequence.rank[1])

    def arrange(self, outlook: Outlook) -> Arrangement:
        served = [*outlook.decoding, *outlook.reading, *outlook.waiting]
        point = max(map(outlook.top, served), default=0)
        return Arrangement(outlook.decoding, outlook.most_read, lambda sequence: point)


class Paper(Policy):
    """MoE-Prism's published throughput policy, asked anew for each step: a virtual queue for each operating point holds
    every request whose floor it keeps; the one with the most tokens for its cost runs, all at that point.

    A queue as long as the batch may be runs at once, and so does the cheapest one that holds a sequence which has not
    run for `longest_wait_s`. Source: MoE-Prism's first version, section on the cloud policy, which launches a batch to
    its end; the wait is a parameter there without a value.
    """

    def __init__(self, costs: StepCosts, longest_wait_s: float = 0.5) -> None:
        super().__init__(costs)
        self._longest_wait_s = longest_wait_s
        self._ran_s: dict[str, float] = {}

    def arrange(self, outlook: Outlook) -> Arrangement:
        if not self.costs.known:
            return Arrangement(outlook.decoding, outlook.most_read, outlook.top)
        queue = [*outlook.reading, *sorted(outlook.waiting, key=lambda one: one.rank)[: outlook.free]]
        floors = {one: floor_of(one, outlook.top(one)) for one in (*outlook.decoding, *queue)}
        points = sorted(set(floors.values()))
        if not points:
            return Arrangement([], outlook.most_read, outlook.top)
        full = len(outlook.decoding) + len(outlook.reading) + outlook.free
        oldest = min(floors, key=self._last_ran_s)
        if outlook.now_s - self._last_ran_s(oldest) > self._longest_wait_s:
            point = floors[oldest]
        elif filled := [p for p in points if sum(floor <= p for floor in floors.values()) >= full]:
            point = filled[0]
        else:
            point = max(points, key=lambda p: self._tokens_for_cost(outlook, queue, floors, p))
        decode = [one for one in outlook.decoding if floors[one] <= point]
        self._ran_s = {one.request.request_id: self._last_ran_s(one) for one in floors}
        self._ran_s |= {one.request.request_id: outlook.now_s for one in floors if floors[one] <= point}
        return Arrangement(
            decode,
            outlook.most_read,
            lambda sequence: point,
            lambda sequence: floor_of(sequence, outlook.top(sequence)) <= point,
        )

    def _last_ran_s(self, sequence: Sequence) -> float:
        return self._ran_s.get(sequence.request.request_id, sequence.arrived_s)

    def _tokens_for_cost(
        self, outlook: Outlook, queue: Items[Sequence], floors: dict[Sequence, int], point: int
    ) -> float:
        decode = [one for one in outlook.decoding if floors[one] <= point]
        read = list(_cut([one for one in queue if floors[one] <= point], outlook.most_read))
        seconds = self._seconds(decode, read, lambda sequence: point)
        return (len(decode) + sum(count for _, count in read)) / seconds if seconds else 0.0


POLICIES: dict[str, type[Policy]] = {"slack": Slack, "paper": Paper, "fifo": Fifo}
