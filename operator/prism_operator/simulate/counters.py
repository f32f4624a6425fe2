"""What a pod counts between two reports, and its sum over pods: the counters of `prism_api.control`."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from prism_api.control import HISTOGRAM_BOUNDS_MS, INPUT_BOUNDS_TOKENS, OUTPUT_BOUNDS_TOKENS, in_out_cell
from prism_operator.plan.types import ClassDelta
from prism_operator.simulate.workload import SimRequest

CELLS = (len(INPUT_BOUNDS_TOKENS) + 1) * (len(OUTPUT_BOUNDS_TOKENS) + 1)


@dataclass(slots=True)
class Counters:
    """One class since the last report; histograms are sparse, bucket -> count."""

    arrived: int = 0
    finished: int = 0
    met: int = 0
    missed: int = 0
    shed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: dict[int, int] = field(default_factory=dict)
    tpot: dict[int, int] = field(default_factory=dict)
    tokens_by_point: dict[str, int] = field(default_factory=dict)
    in_out: dict[int, int] = field(default_factory=dict)

    def produced(self, point: str, tokens: int) -> None:
        self.output_tokens += tokens
        self.tokens_by_point[point] = self.tokens_by_point.get(point, 0) + tokens

    def judged(self, request: SimRequest, *, met: bool) -> None:
        """A whole answer."""
        ttft_s, tpot_s = request.ttft_s, request.tpot_s
        cell = in_out_cell(request.prompt_tokens, request.output_tokens)
        self.in_out[cell] = self.in_out.get(cell, 0) + 1
        self.finished += 1
        if met:
            self.met += 1
        else:
            self.missed += 1
        _count(self.ttft, ttft_s)
        if tpot_s is not None:
            _count(self.tpot, tpot_s)


def _count(histogram: dict[int, int], seconds: float) -> None:
    bucket = bisect_left(HISTOGRAM_BOUNDS_MS, seconds * 1000)
    histogram[bucket] = histogram.get(bucket, 0) + 1


def total(counters: Iterable[Counters]) -> ClassDelta:
    """Sum over pods, as the operator sees it."""
    arrived = finished = met = missed = shed = prompt_tokens = output_tokens = 0
    ttft: dict[int, int] = {}
    tpot: dict[int, int] = {}
    points: dict[str, int] = {}
    in_out: dict[int, int] = {}
    for one in counters:
        arrived += one.arrived
        finished += one.finished
        met += one.met
        missed += one.missed
        shed += one.shed
        prompt_tokens += one.prompt_tokens
        output_tokens += one.output_tokens
        for mine, theirs in ((ttft, one.ttft), (tpot, one.tpot), (in_out, one.in_out)):
            for bucket, count in theirs.items():
                mine[bucket] = mine.get(bucket, 0) + count
        for point, tokens in one.tokens_by_point.items():
            points[point] = points.get(point, 0) + tokens
    return ClassDelta(
        arrived=arrived,
        finished=finished,
        met=met,
        missed=missed,
        shed=shed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft=_dense(ttft),
        tpot=_dense(tpot),
        tokens_by_point=points,
        in_out=_dense(in_out, CELLS),
    )


def _dense(histogram: dict[int, int], size: int = len(HISTOGRAM_BOUNDS_MS)) -> tuple[int, ...]:
    counts = [0] * size
    for bucket, count in histogram.items():
        counts[bucket] = count
    return tuple(counts)
