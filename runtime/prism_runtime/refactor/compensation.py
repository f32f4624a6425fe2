"""Compensation: a stand-in of low rank for what a budget drops, linear in the experts' input and the dropped cells.

What is dropped is partly predictable: `([x, 1] a + sum of g c[e, n] over dropped cells) u` adds that back for a
fraction of the cost. Fitted in lockstep, a dense and a sparse copy of the text run through the layers together, and
every layer is fitted to what separates the copies: it then repairs the error that earlier layers left, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights
from prism_runtime.kernels.gating import compensate
from prism_runtime.kernels.selection import log_token_factor
from prism_runtime.refactor.elastic import ElasticMethod, compensation_cost
from prism_runtime.refactor.masked import (
    Experts,
    LayerInput,
    LayerRows,
    MaskedModel,
    activations_of_slots,
    combine,
    token_ids,
)
from prism_runtime.refactor.method import Choice, Method, Slots
from prism_runtime.refactor.metric import ordinary
from prism_runtime.refactor.ridge import RidgeSums, with_ones
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.thresholds import Thresholded

PENALTY = 1e-2
METRIC_FLOOR = 1e-3
"""Of the mean diagonal: the metric is inverted."""
BLOCK = 8192

Trajectory = Literal["lockstep", "dense"]


LogFactor = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x [T, H], rms [T]) -> [T]: log of how much an error at a token matters."""


def fit_compensation(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: ElasticMethod,
    metric: Sequence[Tensor],
    rank: int,
    trajectory: Trajectory = "lockstep",
) -> ElasticMethod:
    """The method with compensation of `rank` for what it drops at its thresholds, fitted as `fit_repair` does."""

    def token_factor(layer: int, x: Tensor, rms: Tensor) -> Tensor:
        return log_token_factor(x, rms, method.gates[layer].token)

    bare = replace(method, compensation=None)
    sub_experts = method.gates[0].bias.shape[1]
    fitted = fit_repair(masked, sequences, bare, metric, rank, sub_experts, trajectory, token_factor)
    return replace(method, compensation=fitted)


def fit_repair(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: Method,
    metric: Sequence[Tensor],
    rank: int,
    sub_experts: int,
    trajectory: Trajectory = "lockstep",
    log_factor: LogFactor = lambda _, __, rms: -rms.log(),
) -> list[CompensationWeights]:
    """Compensation of `rank` for what any method drops, fitted layer after layer.

    metric      [H, H] a layer: the norm in which errors are made small
    sub_experts of an expert: what is dropped of each is told apart
    trajectory  "lockstep", or "dense": every layer sees what the full model gives it and repairs only its own error
    log_factor  weight of a token's squared error; by default the norm that follows divides by the residual's size

    Holds the hidden states of the whole text, twice for lockstep: as many sequences as that leaves room for.
    """
    fitted: list[CompensationWeights] = []
    ids = token_ids(sequences)
    tokens = ids.numel()

    def visit(entering: LayerInput) -> Tensor:
        experts = masked.experts[entering.layer]
        dense = _part(entering, slice(0, tokens))
        full = _full(experts, dense.rows)
        sparse, target = dense, full
        if trajectory == "lockstep":
            sparse = _part(entering, slice(tokens, None))
            target = dense.residual + full - sparse.residual
        runs = [_run(masked, method, _part(sparse, block), sub_experts) for block in _blocks(tokens)]
        importance = _importance(sparse, log_factor)
        weights = _solve(runs, target, importance, metric[entering.layer], rank, len(experts.down))
        fitted.append(weights)
        if trajectory == "dense":
            return full
        return torch.cat([full, *(run.output + _compensate(run.rows, run.dropped, weights) for run in runs)])

    masked.run(ids if trajectory == "dense" else torch.cat((ids, ids)), visit)
    return fitted


class Repaired:
    """A method with thresholds, and compensation for what it drops of each sub-expert: a share of its neurons.

    For methods whose cells are no sub-experts; `ElasticMethod` carries its compensation itself, as the run time does.
    """

    def __init__(self, method: Thresholded, compensation: Sequence[CompensationWeights]) -> None:
        self.name = f"{method.name}, repaired"
        self.log_tau = method.log_tau
        self.price = method.price
        self._method = method
        self._compensation = compensation

    def at(self, log_tau: Tensor) -> "Repaired":
        return Repaired(self._method.at(log_tau), self._compensation)

    def scores(self, slots: Slots) -> Tensor:
        return self._method.scores(slots)

    def choose(self, slots: Slots) -> Choice:
        choice, weights = self._method.choose(slots), self._compensation[slots.layer]
        rows = LayerRows(slots.x, slots.rms, slots.expert_ids, slots.router_weights)
        dropped = _dropped_shares(choice.keep, weights.c.shape[1])
        # A share is a sum over the neurons' bits; like a norm it is elementwise work, and not counted.
        cost = compensation_cost(len(weights.u), slots.x.shape[1], (dropped > 0).sum((1, 2)))
        added = _compensate(rows, dropped, weights)
        return replace(choice, added=added, extra=choice.extra + cost)


@dataclass(frozen=True, slots=True)
class _Run:
    """A block of rows under the method: its bare output [T, H], and what it dropped of every sub-expert [T, K, N]."""

    rows: LayerRows
    output: Tensor
    dropped: Tensor


def _run(masked: MaskedModel, method: Method, entering: LayerInput, sub_experts: int) -> _Run:
    slots = masked.slots(entering)
    choice = method.choose(slots)
    output = combine(
        masked.experts[entering.layer], entering.rows, slots.activations * choice.keep, choice.router_weights
    )
    return _Run(entering.rows, output, _dropped_shares(choice.keep, sub_experts))


def _dropped_shares(keep: Tensor, sub_experts: int) -> Tensor:
    """[T, K, C] bool -> [T, K, N]: share of each sub-expert's neurons that is dropped."""
    return 1 - keep.unflatten(2, (sub_experts, -1)).float().mean(-1)


def _importance(entering: LayerInput, log_factor: LogFactor) -> Tensor:
    """[T]: weights of squared errors, the largest one; zero for tokens of massive activations."""
    kept = ordinary(entering.rows.rms)
    scale = log_factor(entering.layer, entering.rows.x, entering.rows.rms)
    return (2 * (scale - scale[kept].max())).exp() * kept


def _compensate(rows: LayerRows, dropped: Tensor, weights: CompensationWeights) -> Tensor:
    return compensate(rows.x, rows.expert_ids, rows.router_weights, dropped, weights)


def _solve(
    runs: Sequence[_Run], target: Tensor, importance: Tensor, metric: Tensor, rank: int, experts: int
) -> CompensationWeights:
    """The best repair of `target` less the runs' output."""
    hidden = target.shape[1]
    sub_experts = runs[0].dropped.shape[2]
    metric = metric + METRIC_FLOOR * metric.diagonal().mean() * torch.eye(hidden)
    root = torch.linalg.cholesky(metric)
    sums = RidgeSums(hidden + 1 + experts * sub_experts, hidden)
    for block, run in zip(_blocks(len(target)), runs, strict=True):
        features = torch.cat((with_ones(run.rows.x), _dropped_mass(run, experts)), 1)
        sums.add(features, (target[block] - run.output) @ root, importance[block])
    solution = sums.solve(PENALTY, (hidden + 1, experts * sub_experts)).double()
    # The best output of this rank is spanned by the leading directions of what the ridge predicts.
    spread = solution.t() @ sums.gram @ solution
    leading = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
    inner = (solution @ leading).float()
    u = torch.linalg.solve(root.double().t(), leading).t().float()
    return CompensationWeights(
        inner[: hidden + 1].contiguous(),
        u.contiguous(),
        inner[hidden + 1 :].view(experts, sub_experts, rank).contiguous(),
    )


def _dropped_mass(run: _Run, experts: int) -> Tensor:
    """[T, E N]: router weight of every sub-expert, times the share of it that is dropped."""
    mass = torch.zeros(len(run.output), experts, run.dropped.shape[2])
    at = run.rows.expert_ids[..., None].expand_as(run.dropped)
    return mass.scatter_add_(1, at, run.dropped * run.rows.router_weights[..., None]).flatten(1)


def _full(experts: Experts, rows: LayerRows) -> Tensor:
    parts = [rows.select(block) for block in _blocks(len(rows.x))]
    return torch.cat(
        [combine(experts, part, activations_of_slots(experts, part), part.router_weights) for part in parts]
    )


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, tokens, BLOCK)]


def _part(entering: LayerInput, tokens: slice) -> LayerInput:
    return LayerInput(entering.layer, entering.rows.select(tokens), entering.residual[tokens])
