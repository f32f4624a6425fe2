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

import torch
from torch import Tensor

from prism_api.manifest import Divergence
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import PackedModel, batches


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
