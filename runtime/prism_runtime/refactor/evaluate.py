"""How far each operating point is from the full model, in nats per token, on text that calibration has not seen.

Relative quality is exp(-KL), KL the mean over domains of the per-token mean KL(full || point): 1 at full budget, and
the geometric mean of the probability ratio on the full model's own distribution. Tokens of one sequence are not
independent, so the standard error counts sequences, not tokens, within each domain.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prism_api.manifest import Divergence
from prism_runtime.refactor.baselines import MaskedForward, OracleGate
from prism_runtime.refactor.bootstrap import Floats
from prism_runtime.refactor.method import Method
from prism_runtime.refactor.points import Candidates, Run
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import PackedModel, batches
from prism_runtime.refactor.watch import Observation, Watch


@dataclass(frozen=True, slots=True)
class PointQuality:
    """Measured quality of one operating point. `by_domain` holds each domain's mean KL in nats per token."""

    kl: Divergence
    same_top1: float
    realised_permille: int
    by_domain: dict[str, float]

    @property
    def relative_quality(self) -> Decimal:
        return _quality(self.kl.mean)

    @property
    def relative_quality_low(self) -> Decimal:
        """Lower end of the 95 % interval."""
        return _quality(self.kl.mean + 1.96 * self.kl.standard_error)


def relative_quality(kl: Sequence[float], domains: Sequence[str]) -> tuple[Decimal, Decimal]:
    """(relative quality, lower end of its 95 % interval) of per-sequence KL. Raises ValueError as `require_spread`."""
    mean, standard_error, _ = clustered_mean(kl, domains)
    return _quality(mean), _quality(mean + 1.96 * standard_error)


def _quality(nats: float) -> Decimal:
    """exp(-nats) cut to four digits, never rounded up: a floor must not be met by rounding."""
    return Decimal(min(1.0, math.exp(-nats))).quantize(Decimal("0.0001"), rounding=ROUND_DOWN)


class _PointSums:
    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.agreeing = 0
        self.realised: list[float] = []

    def add(self, full: Tensor, point: Tensor, realised: float) -> None:
        self.kl.append((full.exp() * (full - point)).sum(-1))
        self.agreeing += int((full.argmax(-1) == point.argmax(-1)).sum())
        self.realised.append(realised)

    def quality(self, domains: Sequence[str]) -> PointQuality:
        kl = torch.cat(self.kl).double()
        mean, standard_error, by_domain = clustered_mean(kl.mean(1).tolist(), domains)
        divergence = Divergence(
            mean=mean, standard_error=standard_error, p99=float(kl.quantile(0.99)), tokens=kl.numel()
        )
        realised = round(1000 * sum(self.realised) / len(self.realised))
        return PointQuality(divergence, self.agreeing / kl.numel(), realised, by_domain)


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, dict[str, float]]:
    """(mean of the clusters' means, its standard error, the clusters' means); values within a cluster are independent.

    Raises ValueError as `require_spread` does.
    """
    require_spread(clusters)
    grouped: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        grouped.setdefault(cluster, []).append(value)
    means = {cluster: sum(members) / len(members) for cluster, members in grouped.items()}
    variance = sum(
        sum((value - means[cluster]) ** 2 for value in members) / (len(members) - 1) / len(members)
        for cluster, members in grouped.items()
    )
    return sum(means.values()) / len(means), math.sqrt(variance) / len(means), means


def require_spread(domains: Sequence[str]) -> None:
    """Raises ValueError if a domain has one sequence only: there is no standard error then."""
    if alone := [domain for domain, sequences in Counter(domains).items() if sequences < 2]:
        raise ValueError(f"evaluation needs at least 2 sequences of every domain; {alone} have 1: give longer text")


def evaluate_points(
    model: PackedModel,
    sequences: Sequence[TokenSequence],
    points: Sequence[int],
    full: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, PointQuality]:
    """Quality of the ladder indices `points` against the index `full` on token sequences of one length.

    `advance` is told the number of sequences after each batch.
    """
    domains = [sequence.domain for sequence in sequences]
    require_spread(domains)
    sums = {point: _PointSums() for point in points}
    for batch in batches(sequences, size=4):
        reference = model.log_probabilities(batch, full)
        for point in points:
            model.plan.reset_counters()
            observed = model.log_probabilities(batch, point)
            sums[point].add(reference, observed, model.plan.realised_budget)
        advance(len(batch))
    return {point: gathered.quality(domains) for point, gathered in sums.items()}


# -- any method on the masked model ---------------------------------------------------------------------------------


class CountingForward(MaskedForward, Protocol):
    """A masked model that counts what its calls since `reset` cost, as shares of the full cost."""

    def reset(self) -> None: ...

    @property
    def realised(self) -> float: ...

    @property
    def realised_by_layer(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """A method at one budget. `family` names the curve that its budgets make; `nominal` is the share asked for."""

    family: str
    nominal: float
    method: Method


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one subject measured, each sequence for itself, so that subjects can be compared in pairs.

    kl             [S]  mean KL(full || point) of a sequence's positions, nats
    cross_entropy  [S]  mean over its targets, nats
    same_top1      [S]  share of positions whose most likely token is the full model's
    lost, gained   [S]  share of targets that the full model's first choice meets and the point's does not, and reverse
    median, p99, largest  of the KL of single positions
    realised            share of the full cost, every cost counted; by_layer for each MoE layer
    sparse, dense       what a Watch saw with earlier layers sparse, and with them whole; None if nothing was watched
    """

    family: str
    name: str
    nominal: float
    kl: Floats
    cross_entropy: Floats
    same_top1: Floats
    lost: Floats
    gained: Floats
    median: float
    p99: float
    largest: float
    realised: float
    realised_by_layer: list[float]
    sparse: Observation | None
    dense: Observation | None


@dataclass(frozen=True, slots=True)
class Watching:
    """Asks for layer observations on every `every`-th batch; they cost a second forward."""

    layers: int
    sub_experts: int
    oracle: OracleGate | None = None
    every: int = 4


class _Sums:
    """Of one subject on so many sequences of one length. Their memory is taken at once: small pieces, kept one by one
    among the large ones that every forward frees, keep the allocator from giving those back.
    """

    def __init__(self, subject: Subject, watching: Watching | None, sequences: int, length: int) -> None:
        self.subject = subject
        self.rows = torch.empty(sequences, 5)
        self.positions = torch.empty(sequences, length)
        self.measured = 0
        self.realised = 0.0
        self.by_layer: list[float] = []
        self.watches = None if watching is None else [_watch(subject, watching, dense=dense) for dense in (False, True)]

    def add(self, full: Tensor, point: Tensor, targets: Tensor) -> None:
        kl = (full.exp() * (full - point)).sum(-1)
        first, other = full.argmax(-1), point.argmax(-1)
        met, meets = first[:, :-1] == targets, other[:, :-1] == targets
        here = slice(self.measured, self.measured + len(kl))
        self.measured = here.stop
        self.positions[here] = kl
        self.rows[here] = torch.stack(
            [
                kl.mean(1),
                -point[:, :-1].gather(-1, targets[..., None])[..., 0].mean(1),
                (first == other).float().mean(1),
                (met & ~meets).float().mean(1),
                (meets & ~met).float().mean(1),
            ],
            1,
        )

    def count(self, model: CountingForward, sequences: int) -> None:
        self.realised += model.realised * sequences
        layers = [share * sequences for share in model.realised_by_layer]
        self.by_layer = [a + b for a, b in zip(self.by_layer, layers, strict=True)] if self.by_layer else layers

    def measurement(self, sequences: int) -> Measurement:
        kl, cross_entropy, same_top1, lost, gained = self.rows.double().numpy().T
        positions = self.positions.flatten().sort().values
        sparse, dense = (None, None) if self.watches is None else (each.observation() for each in self.watches)
        return Measurement(
            self.subject.family,
            self.subject.method.name,
            self.subject.nominal,
            kl,
            cross_entropy,
            same_top1,
            lost,
            gained,
            median=float(positions[len(positions) // 2]),
            p99=float(positions[int(0.99 * (len(positions) - 1))]),
            largest=float(positions[-1]),
            realised=self.realised / sequences,
            realised_by_layer=[share / sequences for share in self.by_layer],
            sparse=sparse,
            dense=dense,
        )


def candidates_of(rows: Sequence[Measurement]) -> Candidates:
    """One method's budgets as candidates for operating points."""
    return Candidates(
        np.array([row.nominal for row in rows]),
        np.array([row.realised for row in rows]),
        np.stack([row.kl for row in rows]),
    )


def run_of(rows: Sequence[Measurement], domains: Sequence[str]) -> Run:
    """The same budgets, measured with another calibration or on another text, to see whether they are stable."""
    means = [clustered_mean(row.kl.tolist(), domains)[0] for row in rows]
    return Run(np.array([row.realised for row in rows]), np.array(means))


def _watch(subject: Subject, watching: Watching, *, dense: bool) -> Watch:
    return Watch(subject.method, watching.layers, watching.sub_experts, dense=dense, oracle=watching.oracle)


def evaluate_methods(
    model: CountingForward,
    sequences: Sequence[TokenSequence],
    subjects: Sequence[Subject],
    watching: Watching | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """Measure every subject against the full model on sequences of one length; one row a subject, in their order.

    `advance` is told the number of sequences after each batch.
    """
    size = len(sequences), len(sequences[0].ids)
    sums = [_Sums(subject, watching, *size) for subject in subjects]
    for number, batch in enumerate(batches(sequences, size=4)):
        targets = torch.tensor([sequence.ids for sequence in batch])[:, 1:]
        full = model.log_probabilities(batch, None)
        for each in sums:
            method = each.subject.method
            watched = watching is not None and number % watching.every == 0
            if watched and each.watches is not None:
                for watch in each.watches:
                    watch.domains = [sequence.domain for sequence in batch]
                sparse, dense = each.watches
                model.log_probabilities(batch, dense)
                method = sparse
            model.reset()
            each.add(full, model.log_probabilities(batch, method), targets)
            each.count(model, len(batch))
        advance(len(batch))
    return [each.measurement(len(sequences)) for each in sums]
