"""Compensation: a stand-in of low rank for what a budget drops, linear in the experts' input and the dropped cells.

What is dropped is partly predictable: `([x, 1] a + sum of g c[e, n] over dropped cells) u` adds that back for a
fraction of the cost. Fitted in lockstep, a dense and a sparse copy of the text run through the layers together, and
every layer is fitted to what separates the copies: it then repairs the error that earlier layers left, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights
from prism_runtime.kernels.selection import log_token_factor
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.masked import (
    Experts,
    LayerInput,
    LayerRows,
    MaskedModel,
    activations_of_slots,
    combine,
    token_ids,
)
from prism_runtime.refactor.metric import ordinary
from prism_runtime.refactor.ridge import RidgeSums, with_ones
from prism_runtime.refactor.text import TokenSequence

PENALTY = 1e-2
METRIC_FLOOR = 1e-3
"""Of the mean diagonal: the metric is inverted."""
BLOCK = 8192

Trajectory = Literal["lockstep", "dense"]


def fit_compensation(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: ElasticMethod,
    metric: Sequence[Tensor],
    rank: int,
    trajectory: Trajectory = "lockstep",
) -> ElasticMethod:
    """The method with compensation of `rank` for what it drops at its thresholds, fitted layer after layer.

    metric      [H, H] a layer: the norm in which errors are made small
    trajectory  "lockstep", or "dense": every layer sees what the full model gives it and repairs only its own error

    Holds the hidden states of the whole text, twice for lockstep: as many sequences as that leaves room for.
    """
    fitted: list[CompensationWeights] = []
    ids = token_ids(sequences)
    tokens = ids.numel()
    bare = replace(method, compensation=None)

    def visit(entering: LayerInput) -> Tensor:
        experts = masked.experts[entering.layer]
        dense = _part(entering, slice(0, tokens))
        full = _full(experts, dense.rows)
        if trajectory == "dense":
            fitted.append(_fit_layer(masked, bare, dense, full, metric[dense.layer], rank))
            return full
        sparse = _part(entering, slice(tokens, None))
        target = dense.residual + full - sparse.residual
        fitted.append(_fit_layer(masked, bare, sparse, target, metric[dense.layer], rank))
        compensated = replace(method, compensation=fitted)
        output = [masked.masked(compensated, _part(sparse, block))[0] for block in _blocks(tokens)]
        return torch.cat([full, *output])

    masked.run(ids if trajectory == "dense" else torch.cat((ids, ids)), visit)
    return replace(method, compensation=fitted)


def _fit_layer(
    masked: MaskedModel, bare: ElasticMethod, entering: LayerInput, target: Tensor, metric: Tensor, rank: int
) -> CompensationWeights:
    count, _, hidden = masked.experts[entering.layer].down.shape
    gate = bare.gates[entering.layer]
    sub_experts = gate.bias.shape[1]
    metric = metric + METRIC_FLOOR * metric.diagonal().mean() * torch.eye(hidden)
    root = torch.linalg.cholesky(metric)
    sums = RidgeSums(hidden + 1 + count * sub_experts, hidden)
    kept = ordinary(entering.rows.rms)
    scale = log_token_factor(entering.rows.x, entering.rows.rms, gate.token)
    importance = (2 * (scale - scale[kept].max())).exp() * kept
    for block in _blocks(len(target)):
        part = _part(entering, block)
        slots = masked.slots(part)
        keep = bare.cells(slots)[0]
        neurons = keep.repeat_interleave(slots.activations.shape[2] // sub_experts, dim=2)
        output = combine(
            masked.experts[entering.layer], part.rows, slots.activations * neurons, part.rows.router_weights
        )
        features = torch.cat((with_ones(part.rows.x), _dropped_mass(part.rows, keep, count)), 1)
        sums.add(features, (target[block] - output) @ root, importance[block])
    solution = sums.solve(PENALTY, (hidden + 1, count * sub_experts)).double()
    # The best output of this rank is spanned by the leading directions of what the ridge predicts.
    spread = solution.t() @ sums.gram @ solution
    leading = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
    inner = (solution @ leading).float()
    u = torch.linalg.solve(root.double().t(), leading).t().float()
    return CompensationWeights(
        inner[: hidden + 1].contiguous(),
        u.contiguous(),
        inner[hidden + 1 :].view(count, sub_experts, rank).contiguous(),
    )


def _dropped_mass(rows: LayerRows, keep: Tensor, experts: int) -> Tensor:
    """[T, E N]: router weight of every dropped cell."""
    mass = torch.zeros(len(rows.x), experts, keep.shape[2])
    at = rows.expert_ids[..., None].expand_as(keep)
    return mass.scatter_add_(1, at, ~keep * rows.router_weights[..., None]).flatten(1)


def _full(experts: Experts, rows: LayerRows) -> Tensor:
    parts = [rows.select(block) for block in _blocks(len(rows.x))]
    return torch.cat(
        [combine(experts, part, activations_of_slots(experts, part), part.router_weights) for part in parts]
    )


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, tokens, BLOCK)]


def _part(entering: LayerInput, tokens: slice) -> LayerInput:
    return LayerInput(entering.layer, entering.rows.select(tokens), entering.residual[tokens])
