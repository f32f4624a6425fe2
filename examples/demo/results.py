"""From answers and samples to figures. Pure: the same records give the same figures."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from examples.demo.records import Answer, Sample

BURST_WINDOW_S = 10.0
BURST_SHARE = 0.75
"""A burst lasts while windows hold this share of what the fullest window holds."""
BURST_OVER_MEAN = 1.3
"""Without a window this much above the mean a trace has no burst."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latency objectives of a service class in seconds; None where it has none."""

    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class Burst:
    """First and last arrival of the fullest part of a trace."""

    onset_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """Budget (per-mille) and relative quality by name of the operating points of the served model."""

    budget: Mapping[str, int]
    quality: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Episode:
    """One replay and what was seen meanwhile, on one clock. `samples` may go on after the last answer.

    arrivals_s      when the trace sends its requests
    price_per_hour  of one replica; None if the service names no price
    ack_buckets     directive acknowledgements during the episode: cumulative count by upper bound in seconds
    """

    arrivals_s: Sequence[float]
    answers: Sequence[Answer]
    samples: Sequence[Sample]
    objectives: Objectives
    ladder: Ladder
    service_class: str
    price_per_hour: float | None = None
    ack_buckets: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Moment:
    """An episode at one second: rates and latencies of the last `MOMENT_WINDOW_S`, shares since its start."""

    at_s: float
    arrivals_per_s: float
    waiting: int
    running: int
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    points: Mapping[str, str]
    desired: int
    ready: int
    existing: int
    attainment: float | None
    relative_quality: float | None
    per_hour: float | None


MOMENT_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one replay. Seconds unless the name says otherwise; None where nothing was seen."""

    requests: int
    failed: int
    retries: int
    shed: int
    met: int
    attainment: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    output_tokens: int
    mean_relative_quality: float | None
    lowest_budget: int | None
    onset_to_lower_s: float | None
    return_to_full_s: float | None
    onset_to_second_ready_s: float | None
    most_ready: int
    replica_seconds: float
    ack_p99_s: float | None
    lag_share: float | None
    seconds: float


def is_met(answer: Answer, objectives: Objectives) -> bool:
    """Finished, and within every objective that applies; an answer of one token has no time per token after it."""
    if answer.outcome != "finished" or answer.ttft_s is None:
        return False
    if objectives.ttft_s is not None and answer.ttft_s > objectives.ttft_s:
        return False
    return objectives.tpot_s is None or answer.tpot_s is None or answer.tpot_s <= objectives.tpot_s


def attainment(answers: Sequence[Answer], objectives: Objectives) -> float | None:
    """met / (met + missed + shed); failed requests are missed. None without requests."""
    if not answers:
        return None
    return sum(is_met(answer, objectives) for answer in answers) / len(answers)


def quantile(values: Iterable[float], share: float) -> float | None:
    """Nearest rank: a value that occurred. None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def burst_of(arrivals_s: Sequence[float]) -> Burst | None:
    """The first arrival whose next 10 s are nearly as full as the fullest 10 s, and the last whose previous 10 s are.

    None for a trace without a burst: no window holds `BURST_OVER_MEAN` times the mean.
    """
    if not arrivals_s:
        return None
    times = sorted(arrivals_s)
    ahead = [bisect_left(times, t + BURST_WINDOW_S) - i for i, t in enumerate(times)]
    span_s = max(times[-1] - times[0], BURST_WINDOW_S)
    if max(ahead) < BURST_OVER_MEAN * len(times) * BURST_WINDOW_S / span_s:
        return None
    full = BURST_SHARE * max(ahead)
    behind = [i + 1 - bisect_right(times, t - BURST_WINDOW_S) for i, t in enumerate(times)]
    onset = next(t for t, count in zip(times, ahead, strict=True) if count >= full)
    end = max(t for t, count in zip(times, behind, strict=True) if count >= full)
    return Burst(onset, end)


def replica_seconds(samples: Sequence[Sample], until_s: float) -> float:
    """Integral of existing replicas from the start of the replay; a count holds until the next sample."""
    total = 0.0
    for sample, following in pairwise(samples):
        total += sample.existing * max(0.0, min(following.at_s, until_s) - max(sample.at_s, 0.0))
    if samples:
        total += samples[-1].existing * max(0.0, until_s - max(samples[-1].at_s, 0.0))
    return total


def tokens_by_point(samples: Sequence[Sample]) -> dict[str, int]:
    """Tokens that pods generated between the first and the last sample, by operating point.

    Counters are cumulative per pod. A pod seen later began after the first sample, so all it counted belongs here.
    """
    totals: dict[str, int] = {}
    first = samples[0].pods if samples else {}
    last = {name: pod for sample in samples for name, pod in sample.pods.items()}
    for name, pod in last.items():
        before = first[name].tokens_by_point if name in first else {}
        for point, count in pod.tokens_by_point.items():
            totals[point] = totals.get(point, 0) + count - before.get(point, 0)
    return totals


def lag_share(samples: Sequence[Sample]) -> float | None:
    """Share of the pods' busy time by which steps were slower than their pace; None if no pod was busy.

    What is more than a few per cent says that the machine could not keep the pace, and latencies are of the machine.
    """
    last = {name: pod for sample in samples for name, pod in sample.pods.items()}
    first = samples[0].pods if samples else {}
    busy_s = sum(pod.busy_s - (first[name].busy_s if name in first else 0.0) for name, pod in last.items())
    lag_s = sum(pod.lag_s - (first[name].lag_s if name in first else 0.0) for name, pod in last.items())
    return lag_s / busy_s if busy_s > 0 else None


def mean_relative_quality(tokens: Mapping[str, int], ladder: Ladder) -> float | None:
    """Token-weighted. None without tokens. Raises KeyError for a point that the model does not have."""
    count = sum(tokens.values())
    return sum(n * ladder.quality[point] for point, n in tokens.items()) / count if count else None


def lowest_budget_of(sample: Sample, service_class: str, ladder: Ladder) -> int | None:
    """Smallest live budget (per-mille) of any pod for a class; None if no pod told."""
    told = [ladder.budget[pod.points[service_class]] for pod in sample.pods.values() if service_class in pod.points]
    return min(told, default=None)


def onset_to_lower_s(
    answers: Sequence[Answer], samples: Sequence[Sample], service_class: str, ladder: Ladder, burst: Burst
) -> float | None:
    """From the onset of the burst to the first pod seen, or first token made, below the budget held at the onset.

    None if the budget never fell. Resolution: the period of the samples, or the next first token if that is sooner.
    """
    seen = [(s.at_s, low) for s in samples if (low := lowest_budget_of(s, service_class, ladder)) is not None]
    before = [low for at_s, low in seen if at_s <= burst.onset_s]
    held = before[-1] if before else max(ladder.budget.values())
    made = [
        (a.at_s + a.ttft_s, ladder.budget[a.point]) for a in answers if a.ttft_s is not None and a.point is not None
    ]
    lower = [at_s for at_s, budget in seen + made if at_s > burst.onset_s and budget < held]
    return min(lower) - burst.onset_s if lower else None


def return_to_full_s(samples: Sequence[Sample], service_class: str, ladder: Ladder, burst: Burst) -> float | None:
    """From the last arrival of the burst until every pod is at the largest budget and stays there while it was watched.

    None if it never left it or did not come back.
    """
    full = max(ladder.budget.values())
    seen = [(s.at_s, low) for s in samples if (low := lowest_budget_of(s, service_class, ladder)) is not None]
    below = [at_s for at_s, low in seen if low < full]
    if not below or seen[-1][1] < full:
        return None
    back_s = next(at_s for at_s, _ in seen if at_s > below[-1])
    return max(0.0, back_s - burst.end_s)


def moment(episode: Episode, at_s: float) -> Moment:
    """What could be known at `at_s`; later records are not looked at."""
    since_s = at_s - MOMENT_WINDOW_S
    ended = [a for a in episode.answers if a.end_s <= at_s]
    recent = [a for a in ended if a.end_s > since_s]
    samples = [s for s in episode.samples if s.at_s <= at_s]
    now = samples[-1] if samples else Sample(at_s, 0, 0, 0)
    price = episode.price_per_hour
    return Moment(
        at_s=at_s,
        arrivals_per_s=sum(since_s < t <= at_s for t in episode.arrivals_s) / MOMENT_WINDOW_S,
        waiting=sum(pod.waiting for pod in now.pods.values()),
        running=sum(pod.running for pod in now.pods.values()),
        ttft_p95_s=quantile([a.ttft_s for a in recent if a.ttft_s is not None], 0.95),
        tpot_p95_s=quantile([a.tpot_s for a in recent if a.tpot_s is not None], 0.95),
        points={name: pod.points.get(episode.service_class, "?") for name, pod in sorted(now.pods.items())},
        desired=now.desired,
        ready=now.ready,
        existing=now.existing,
        attainment=attainment(ended, episode.objectives),
        relative_quality=mean_relative_quality(tokens_by_point(samples), episode.ladder),
        per_hour=None if price is None else price * now.existing,
    )


def histogram_quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Quantile of cumulative counts by upper bound, linear inside a bucket as Prometheus does it.

    None without counts; the largest finite bound if the quantile lies above it.
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank, lower, below = share * buckets[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


def summarise(episode: Episode) -> Summary:
    """Figures of one replay; replica-seconds end with its last answer."""
    answers, samples, objectives = episode.answers, episode.samples, episode.objectives
    seen = (samples, episode.service_class, episode.ladder)
    until_s = max((answer.end_s for answer in answers), default=0.0)
    burst = burst_of(episode.arrivals_s)
    ttft = [a.ttft_s for a in answers if a.ttft_s is not None]
    tpot = [a.tpot_s for a in answers if a.tpot_s is not None]
    budgets = [low for s in samples if (low := lowest_budget_of(s, *seen[1:])) is not None]
    ready = [s.at_s for s in samples if burst and s.at_s > burst.onset_s and s.ready >= 2]
    return Summary(
        requests=len(answers),
        failed=sum(a.outcome == "failed" for a in answers),
        retries=sum(a.retries for a in answers),
        shed=sum(a.outcome == "shed" for a in answers),
        met=sum(is_met(a, objectives) for a in answers),
        attainment=attainment(answers, objectives),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p95_s=quantile(ttft, 0.95),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p95_s=quantile(tpot, 0.95),
        output_tokens=sum(a.output_tokens for a in answers),
        mean_relative_quality=mean_relative_quality(tokens_by_point(samples), episode.ladder),
        lowest_budget=min(budgets, default=None),
        onset_to_lower_s=onset_to_lower_s(answers, *seen, burst) if burst else None,
        return_to_full_s=return_to_full_s(*seen, burst) if burst else None,
        onset_to_second_ready_s=ready[0] - burst.onset_s if burst and ready else None,
        most_ready=max((s.ready for s in samples), default=0),
        replica_seconds=replica_seconds(samples, until_s),
        lag_share=lag_share(samples),
        ack_p99_s=histogram_quantile(episode.ack_buckets, 0.99),
        seconds=until_s,
    )


DEVIATIONS = 2.0
"""Standard deviations of the difference of two independent shares that count as more than chance."""


def comparison(elastic: Summary, held: Summary) -> str:
    """What the knob bought, also when it bought nothing; a second sentence says when that may be chance."""
    if elastic.attainment is None or held.attainment is None:
        return "No comparison: one of the replays has no requests."
    gain = elastic.attainment - held.attainment
    if abs(gain) < 0.005:
        verb = f"left attainment at {elastic.attainment:.1%}"
    else:
        verb = (
            f"{'raised' if gain > 0 else 'lowered'} attainment from {held.attainment:.1%} to {elastic.attainment:.1%}"
        )
    ttft = ""
    if elastic.ttft_p95_s is not None and held.ttft_p95_s is not None:
        ttft = f", p95 time to first token {elastic.ttft_p95_s:.2f} s instead of {held.ttft_p95_s:.2f} s"
    quality = ""
    if elastic.mean_relative_quality is not None:
        quality = f", at a mean relative quality of {elastic.mean_relative_quality:.4f}"
    spread = DEVIATIONS * math.sqrt(
        elastic.attainment * (1 - elastic.attainment) / elastic.requests
        + held.attainment * (1 - held.attainment) / held.requests
    )
    doubt = "" if abs(gain) > spread else " One run of each cannot tell this difference from chance."
    return (
        f"The activation budget {verb}{ttft}, with {elastic.replica_seconds:.0f} replica-seconds instead of "
        f"{held.replica_seconds:.0f}{quality}.{doubt}"
    )
