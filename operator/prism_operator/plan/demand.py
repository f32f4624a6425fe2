"""Offered load per class: what it presses with now, what it was over a while, mean lengths, latency quantiles.

Offered, not served: shed requests count. Unknown is not zero: a class nobody spoke of has rate None, a class with fresh
reports and no arrivals has rate 0. Counts come from some of the ready pods when others are silent; the rate is then
scaled up by the share heard.

What a class presses with is the least capacity that keeps every wait within its patience D. A pool of capacity C that
answers in order lets nobody wait for longer than D if and only if, for every window of w seconds that ends now, the A
requests that arrived in it fit into w + D seconds: A <= C * (w + D) (the delay bound of the network calculus: Cruz,
IEEE Trans. Inf. Theory 37(1), 1991). So the pressing rate is the largest A / (w + D): a burst counts for what it makes
others wait, noise that nobody would notice does not, and a burst is forgotten once a pool of that capacity would be
done with it. No threshold says what a burst is.

A decision stands until the next one, T later, so the windows that end then count as well: (A + a) / (w + T + D), with
a what surely still comes: the arrivals of the last tick less two standard deviations of such a count (Poisson). Of a
burst that is building up it is nearly all, of the noise of a steady load nearly nothing.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prism_api.control import histogram_quantile
from prism_operator.plan import calibration, lengths
from prism_operator.plan.calibration import Evidence
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.types import (
    ClassDelta,
    ClassPolicy,
    DemandState,
    Lengths,
    LoopSettings,
    Observation,
    Sample,
    ServicePolicy,
)

COARSE_S = 10.0
"""Width of the sums that keep history older than the long window, and period of the profile's correction."""
WIDEST_LONG_WINDOWS = 10
"""A sparse class's long window widens to this many long windows (60 s to 600 s)."""
SURE_DEVIATIONS = 2.0
"""Of a count's standard deviations, taken off what is counted on to come next: wrong for one count in forty."""
_TICK_TOLERANCE_S = 1e-6


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals a second, and what the figure rests on."""

    per_s: float
    arrivals: int
    span_s: float


def update(state: DemandState, observation: Observation, policy: ServicePolicy) -> DemandState:
    """Add one tick. Equal or earlier `now_s` changes nothing, so that a repeated observation is not counted twice.

    The first observation only opens the interval: what counters grew by before it has no duration.
    """
    now_s = observation.now_s
    if state.last_s is None:
        return DemandState(since_s=now_s, last_s=now_s, samples={})
    if now_s <= state.last_s:
        return state
    ready = len(observation.ready)
    heard = len(observation.fresh) / ready if ready else 1.0
    samples, cells = {}, {}
    for class_policy in policy.classes:
        name = class_policy.name
        history = state.samples.get(name, ())
        delta = observation.classes.get(name)
        counted = () if delta is None else delta.in_out
        cells[name] = lengths.faded(state.cells.get(name, ()), counted, now_s - state.last_s)
        if delta is not None:
            # Counters are cumulative: after a silence the difference covers all of it.
            start_s = history[-1].end_s if history else state.last_s
            kept = replace(delta, in_out=()) if delta.in_out else delta  # the cells have them
            history = (*history, Sample(start_s, now_s, heard or 1.0, kept))
        keep_s = max(class_policy.window_s, WIDEST_LONG_WINDOWS * policy.loop.long_window_s)
        samples[name] = _compact(history, now_s - keep_s, now_s - policy.loop.long_window_s)
    due = now_s // COARSE_S > state.last_s // COARSE_S
    pods = tuple(sorted(pod.uid for pod in observation.ready))
    ready_since_s = state.ready_since_s if pods == state.ready_pods else now_s
    state = replace(state, last_s=now_s, samples=samples, ready_pods=pods, ready_since_s=ready_since_s, cells=cells)
    # Latencies seen with another number of pods say nothing about this one.
    if not due or ready_since_s is None or now_s - ready_since_s <= policy.loop.long_window_s + COARSE_S:
        return state
    evidence = _evidence(state, policy)
    factor, variance = calibration.corrected(
        state.cost_factor, state.cost_variance, evidence, observation, policy.loop, COARSE_S
    )
    return replace(state, cost_factor=factor, cost_variance=variance)


def _evidence(state: DemandState, policy: ServicePolicy) -> list[Evidence]:
    evidence = []
    for class_policy in policy.classes:
        seen = window(state, class_policy.name, policy.loop.long_window_s)
        rate = long_rate(state, class_policy.name, policy)
        typical = mean_lengths(state, class_policy.name)
        if seen.arrived and rate is not None and typical is not None:
            peak = peak_rate(state, class_policy.name, policy, policy.loop.long_window_s)
            peak_per_s = rate.per_s if peak is None else max(rate.per_s, peak.per_s)
            evidence.append(Evidence(ClassLoad(class_policy, rate.per_s, typical), peak_per_s, seen))
    return evidence


def patience_s(class_policy: ClassPolicy, loop: LoopSettings) -> float:
    """How long a request of the class may wait for others before that is too long."""
    return loop.short_window_s if class_policy.ttft_s is None else loop.high * class_policy.ttft_s


def pressing_rate(state: DemandState, name: str, policy: ServicePolicy) -> Rate | None:
    """Rate of the fast loop: the least capacity that keeps waits within patience. None while the class is unknown."""
    history = state.samples.get(name, ())
    if not _known(state, history, policy.loop):
        return None
    loop, newest = policy.loop, history[-1]
    counts = _counts(history, newest.end_s - loop.long_window_s)
    ahead_s, coming = loop.fast_period_s, _surely_coming(newest, loop.fast_period_s)
    return _pressing(counts, len(counts) - 1, patience_s(policy.by_name(name), loop), loop, ahead_s, coming)


def lasting_rate(state: DemandState, name: str, policy: ServicePolicy) -> Rate | None:
    """The least that pressed in the short window: what a blip, gone before an order is written, does not raise.

    None while the class is unknown.
    """
    history = state.samples.get(name, ())
    if state.last_s is None or not _known(state, history, policy.loop):
        return None
    loop, patient_s = policy.loop, patience_s(policy.by_name(name), policy.loop)
    since_s = history[-1].end_s - loop.short_window_s + _TICK_TOLERANCE_S
    counts = _counts(history, since_s - loop.long_window_s)
    recent = (position for position in reversed(range(len(counts))) if counts[position].end_s > since_s)
    rates = (_pressing(counts, position, patient_s, loop) for position in recent)
    return min(rates, key=lambda rate: rate.per_s)


def peak_rate(state: DemandState, name: str, policy: ServicePolicy, seconds: float) -> Rate | None:
    """The largest pressing rate of the last `seconds`, with the arrivals of these; None while the class is unknown."""
    history = state.samples.get(name, ())
    if state.last_s is None or not _known(state, history, policy.loop):
        return None
    loop, patient_s = policy.loop, patience_s(policy.by_name(name), policy.loop)
    since_s = state.last_s - seconds + _TICK_TOLERANCE_S
    counts = _counts(history, since_s - loop.long_window_s)
    peak, arrivals = 0.0, 0
    for position in reversed(range(len(counts))):
        if counts[position].end_s <= since_s:
            break
        arrivals += counts[position].arrived
        peak = max(peak, _pressing(counts, position, patient_s, loop).per_s)
    return Rate(peak, arrivals, seconds)


def recent_rate(state: DemandState, name: str, policy: ServicePolicy) -> Rate | None:
    """Mean rate since the slow loop's last decision, None while the class is unknown."""
    return _rate(state, name, policy.loop.slow_period_s, policy.loop)


def long_rate(state: DemandState, name: str, policy: ServicePolicy) -> Rate | None:
    """Rate of the slow loop, None while the class is unknown; sparse classes look back over a wider window."""
    loop = policy.loop
    rate = _rate(state, name, loop.long_window_s, loop)
    if rate is None or rate.arrivals == 0 or rate.arrivals >= loop.enough_arrivals:
        return rate
    return _rate(state, name, WIDEST_LONG_WINDOWS * loop.long_window_s, loop)


def mean_lengths(state: DemandState, name: str) -> Lengths | None:
    """Prompt and output of the requests remembered, None before one finished.

    Tokens are counted as they come, so requests in flight have given a part of theirs: on average half.
    """
    arrived = finished = given_up = prompt_tokens = output_tokens = 0
    for sample in state.samples.get(name, ()):
        delta = sample.delta
        arrived += delta.arrived
        finished += delta.finished
        given_up += delta.shed + delta.cancelled
        prompt_tokens += delta.prompt_tokens
        output_tokens += delta.output_tokens
    if finished <= 0 or arrived <= 0:
        return None
    in_flight = max(0, arrived - finished - given_up)
    means = prompt_tokens / max(1, arrived), output_tokens / (finished + in_flight / 2)
    return lengths.with_moments(*means, state.cells.get(name, ()))


def window(state: DemandState, name: str, seconds: float) -> ClassDelta:
    """Sum of what was counted in the last `seconds`."""
    since = (state.last_s or 0.0) - seconds + _TICK_TOLERANCE_S
    newest_first = itertools.takewhile(lambda sample: sample.end_s > since, reversed(state.samples.get(name, ())))
    return total_of(newest_first)


def latency_quantile_s(histogram: Sequence[int], quantile: float) -> float | None:
    """Quantile of a latency histogram in seconds; None without samples."""
    milliseconds = histogram_quantile(list(histogram), quantile) if histogram else None
    return None if milliseconds is None else milliseconds / 1000


def saturation(seen: ClassDelta, class_policy: ClassPolicy) -> float | None:
    """The worse of both latencies at the promised quantile, over its objective; None without samples."""
    ratios = []
    for histogram, objective_s in ((seen.ttft, class_policy.ttft_s), (seen.tpot, class_policy.tpot_s)):
        latency_s = latency_quantile_s(histogram, class_policy.attainment_target)
        if latency_s is not None and objective_s is not None:
            ratios.append(latency_s / objective_s)
    return max(ratios, default=None)


def attainment(delta: ClassDelta) -> float | None:
    """met / (met + missed + shed); None without any."""
    judged = delta.met + delta.missed + delta.shed
    return delta.met / judged if judged else None


def total_of(samples: Iterable[Sample]) -> ClassDelta:
    return _sum([sample.delta for sample in samples])


def add(left: ClassDelta, right: ClassDelta) -> ClassDelta:
    """Sum of two deltas, field by field."""
    return _sum([left, right])


def _sum(deltas: list[ClassDelta]) -> ClassDelta:
    points: dict[str, int] = {}
    for delta in deltas:
        for point, tokens in delta.tokens_by_point.items():
            points[point] = points.get(point, 0) + tokens
    return ClassDelta(
        arrived=sum(delta.arrived for delta in deltas),
        finished=sum(delta.finished for delta in deltas),
        met=sum(delta.met for delta in deltas),
        missed=sum(delta.missed for delta in deltas),
        shed=sum(delta.shed for delta in deltas),
        cancelled=sum(delta.cancelled for delta in deltas),
        prompt_tokens=sum(delta.prompt_tokens for delta in deltas),
        output_tokens=sum(delta.output_tokens for delta in deltas),
        ttft=_sum_counts([delta.ttft for delta in deltas]),
        tpot=_sum_counts([delta.tpot for delta in deltas]),
        tokens_by_point=points,
        in_out=_sum_counts([delta.in_out for delta in deltas]),
    )


def _sum_counts(histograms: list[tuple[int, ...]]) -> tuple[int, ...]:
    filled = [histogram for histogram in histograms if histogram]
    return tuple(map(sum, zip(*filled, strict=True)))


def _known(state: DemandState, history: Sequence[Sample], loop: LoopSettings) -> bool:
    """Whether the last word on a class is fresh enough to be the truth."""
    if not history or state.last_s is None:
        return False
    return state.last_s - history[-1].end_s <= loop.missed_polls * loop.fast_period_s


def _rate(state: DemandState, name: str, window_s: float, loop: LoopSettings) -> Rate | None:
    history = state.samples.get(name, ())
    if not _known(state, history, loop):
        return None
    # From the last sample, not from now: after a missed poll a short window would hold none.
    since = history[-1].end_s - window_s + _TICK_TOLERANCE_S
    span_s, offered, arrivals = 0.0, 0.0, 0
    for sample in reversed(history):
        if sample.end_s <= since:
            break
        span_s += sample.end_s - sample.start_s
        offered += sample.delta.arrived / sample.heard
        arrivals += sample.delta.arrived
    return Rate(offered / span_s, arrivals, span_s)


class _Count(NamedTuple):
    """A sample's arrivals, and what they are scaled up to all pods."""

    end_s: float
    seconds: float
    arrived: int
    offered: float


def _counts(history: Sequence[Sample], since_s: float) -> list[_Count]:
    """Of the samples that ended after `since_s`. Windows are looked through over and over, and samples are slow."""
    first = len(history)
    while first > 0 and history[first - 1].end_s > since_s:
        first -= 1
    return [
        _Count(one.end_s, one.end_s - one.start_s, one.delta.arrived, one.delta.arrived / one.heard)
        for one in itertools.islice(history, first, None)
    ]


def _pressing(
    counts: Sequence[_Count],
    last: int,
    patient_s: float,
    loop: LoopSettings,
    ahead_s: float = 0.0,
    coming: float = 0.0,
) -> Rate:
    """What presses at the end of count `last`: the largest (A - 1) / (w + D) of all windows up to the long one, for
    nobody waits for itself; at least the mean of the long window, for patience is a loan. With `ahead_s` the windows
    that end so much later count too, until when `coming` more arrive.
    """
    since = counts[last].end_s - loop.long_window_s + _TICK_TOLERANCE_S
    span_s, offered, arrivals, most = 0.0, 0.0, 0, 0.0
    for position in range(last, -1, -1):
        end_s, seconds, arrived, of_all = counts[position]
        if end_s <= since:
            break
        span_s += seconds
        arrivals += arrived
        offered += of_all
        pressed = (offered - 1) / (span_s + patient_s)
        if pressed > most:
            most = pressed
        if ahead_s:
            pressed = (offered + coming - 1) / (span_s + ahead_s + patient_s)
            if pressed > most:
                most = pressed
    return Rate(max(most, offered / span_s), arrivals, span_s)


def _surely_coming(sample: Sample, ahead_s: float) -> float:
    """Arrivals of the `ahead_s` after a sample, if they go on at the least rate that its count speaks for."""
    arrived = sample.delta.arrived
    least = max(0.0, arrived - SURE_DEVIATIONS * math.sqrt(arrived))
    return least / sample.heard * ahead_s / (sample.end_s - sample.start_s)


def _compact(history: tuple[Sample, ...], oldest_s: float, fine_since_s: float) -> tuple[Sample, ...]:
    """Drop what ended before `oldest_s`; merge what ended before `fine_since_s` into sums of COARSE_S."""
    kept: list[Sample] = []
    for sample in history:
        if sample.end_s <= oldest_s:
            continue
        last = kept[-1] if kept else None
        if last is not None and sample.end_s <= fine_since_s and sample.end_s - last.start_s <= COARSE_S:
            kept[-1] = _merge(last, sample)
        else:
            kept.append(sample)
    return tuple(kept)


def _merge(left: Sample, right: Sample) -> Sample:
    left_s, right_s = left.end_s - left.start_s, right.end_s - right.start_s
    heard = (left.heard * left_s + right.heard * right_s) / (left_s + right_s)
    return Sample(left.start_s, right.end_s, heard, add(left.delta, right.delta))
