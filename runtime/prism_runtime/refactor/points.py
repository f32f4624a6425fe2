"""Which budgets of a method are operating points worth having: on the hull, distinct, and stable.

Candidates of any method are (cost, per-sequence KL). A candidate is no point if serving some requests cheaper and some
dearer gives the same cost at a lower KL (it lies above the lower convex hull), if its quality cannot be told from its
neighbour's (paired bootstrap) or its cost is the neighbour's, or if another calibration or text changes the order.
The count is made in the same way for every method, so counts can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prism_runtime.refactor.bootstrap import Floats, Resampling

SMALLEST_COST_STEP = 0.01
"""Two points closer in cost than this are one: a planner has nothing to gain from the second."""
COST_TOLERANCE = 0.02
"""How far the realised cost may be from the nominal one, relative to it, before the name of a point misleads."""
RUNS_FOR_STABILITY = 3
"""Order kept in fewer runs (a calibration seed on a text each) says nothing of stability."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One method's measured budgets, in any order.

    nominal   [P]     budget asked for, share of the full cost
    realised  [P]     cost measured, all of it counted; the axis of the hull
    kl        [P, S]  mean KL to the full model of each sequence, nats per token
    """

    nominal: Floats
    realised: Floats
    kl: Floats

    def take(self, indices: Sequence[int]) -> "Candidates":
        chosen = list(indices)
        return Candidates(self.nominal[chosen], self.realised[chosen], self.kl[chosen])


@dataclass(frozen=True, slots=True)
class Run:
    """The same candidates from another calibration seed or on another text: realised [P], mean KL [P]."""

    realised: Floats
    kl: Floats


@dataclass(frozen=True, slots=True)
class PointCount:
    """What is left of a method's candidates after each test, as indices in ascending cost; each holds the next.

    stable       None if no runs were given
    rises        pairs of neighbouring candidates in cost of which the dearer has the higher KL, before any fit
    largest_rise in nats, the worst of them
    monotone_kl  [P] mean KL after isotonic regression, in the candidates' order
    """

    hull: list[int]
    distinct: list[int]
    stable: list[int] | None
    rises: int
    largest_rise: float
    monotone_kl: Floats


def count_points(candidates: Candidates, domains: Sequence[str], runs: Sequence[Run] = ()) -> PointCount:
    """Put a method's candidates through every test.

    domains  domain of each sequence in `candidates.kl`
    runs     at least 3, over calibration seeds and texts; they hold the candidates in the same order. Without any,
             stability is left open
    """
    resampling = Resampling(domains)
    mean = np.array([resampling.mean(values).value for values in candidates.kl])
    order = np.argsort(candidates.realised, kind="stable")
    rises = [after - before for before, after in pairwise(mean[order]) if after > before]
    monotone = np.empty_like(mean)
    monotone[order] = isotonic(mean[order])
    on_hull = hull(candidates.realised, mean)
    apart = [on_hull[index] for index in distinct(candidates.take(on_hull), resampling)]
    return PointCount(
        hull=on_hull,
        distinct=apart,
        stable=stable(candidates.nominal, apart, runs) if runs else None,
        rises=len(rises),
        largest_rise=float(max(rises, default=0.0)),
        monotone_kl=monotone,
    )


def hull(cost: Floats, kl: Floats) -> list[int]:
    """Indices of the lower convex hull's corners with falling KL, in ascending cost (monotone chain of Andrew, 1979).

    The cheapest candidate is always a corner; the last is the cheapest of those with the lowest KL.
    """
    corners: list[int] = []
    for index in np.lexsort((kl, cost)):
        if corners and cost[index] == cost[corners[-1]]:
            continue  # the better of two candidates of one cost came first
        while len(corners) > 1 and not _turns_up(cost, kl, corners[-2], corners[-1], index):
            corners.pop()
        corners.append(int(index))
    lowest = next((at for at, (low, high) in enumerate(pairwise(corners)) if kl[high] >= kl[low]), len(corners) - 1)
    return corners[: lowest + 1]


def _turns_up(cost: Floats, kl: Floats, first: int, middle: int, last: int) -> bool:
    run, rise = cost[middle] - cost[first], kl[middle] - kl[first]
    return bool(run * (kl[last] - kl[first]) > rise * (cost[last] - cost[first]))


def distinct(candidates: Candidates, resampling: Resampling) -> list[int]:
    """Indices of a chain, ascending in cost, whose neighbours differ in cost and, beyond chance, in KL.

    Walks down from the dearest and keeps a candidate if the 95 % interval of its KL minus that of the last one kept
    lies above 0 and it is cheaper by 1 % of the full cost.
    """
    chain: list[int] = []
    for index in np.argsort(-candidates.realised, kind="stable"):
        if chain:
            above = chain[-1]
            cheaper = candidates.realised[above] - candidates.realised[index] >= SMALLEST_COST_STEP
            worse = resampling.difference(candidates.kl[index], candidates.kl[above]).low > 0
            if not (cheaper and worse):
                continue
        chain.append(int(index))
    return chain[::-1]


def stable(nominal: Floats, chain: Sequence[int], runs: Sequence[Run]) -> list[int]:
    """Those of `chain` (ascending in cost) whose order and cost hold in every run.

    Walks down from the dearest; a point stays if in every run its KL is above that of the last one that stayed and its
    realised cost is within 2 % of nominal. Raises ValueError for fewer than 3 runs.
    """
    if len(runs) < RUNS_FOR_STABILITY:
        raise ValueError(f"stability needs at least {RUNS_FOR_STABILITY} runs over seeds and texts; found {len(runs)}")
    kept: list[int] = []
    for index in reversed(chain):
        on_budget = all(abs(run.realised[index] / nominal[index] - 1) <= COST_TOLERANCE for run in runs)
        in_order = not kept or all(run.kl[index] > run.kl[kept[-1]] for run in runs)
        if on_budget and in_order:
            kept.append(index)
    return kept[::-1]


def isotonic(values: Floats) -> Floats:
    """The non-increasing sequence nearest to `values` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])


def kl_at(cost: Floats, kl: Floats, wanted: float) -> Floats | None:
    """KL at a cost between two measured ones, linear in log KL; None outside of what was measured.

    cost  [P]           kl  [P], or [P, S] for each sequence, which a bootstrap then pairs
    For comparing methods at one realised cost when their budgets are not the same. A point without any KL, as the full
    model's is, has no logarithm and is left out.
    """
    measured = np.asarray(kl).reshape(len(cost), -1).any(1)
    order = np.argsort(cost[measured])
    cost, kl = cost[measured][order], np.maximum(kl[measured][order], np.finfo(np.float64).tiny)
    if not len(cost) or not cost[0] <= wanted <= cost[-1]:
        return None
    above = max(1, int(np.searchsorted(cost, wanted))) if len(cost) > 1 else 0
    below = max(0, above - 1)
    share = (wanted - cost[below]) / (cost[above] - cost[below]) if cost[above] > cost[below] else 0.0
    between: Floats = np.exp((1 - share) * np.log(kl[below]) + share * np.log(kl[above]))
    return between
