"""Thresholds that spend a budget: quantiles of the scores, corrected on the sparse trajectory.

What a layer drops changes what the next one sees, and compensation and an adaptive gate cost what depends on the
threshold, so the quantile that meets the budget is found by running the method and looking.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.masked import LayerInput, MaskedModel, token_ids
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches

TOLERANCE = 5e-4
SCORES_A_LAYER = 2_000_000


def calibrate_thresholds(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: ElasticMethod,
    budget: float,
    *,
    by_layer: bool = False,
    rounds: int = 4,
) -> ElasticMethod:
    """The method with the `log_tau` [L] at which its realised budget on the text is `budget`, all costs counted.

    by_layer  every layer spends the budget, by a threshold of its own; else one threshold serves all layers, and layers
              whose errors matter more keep more
    """
    if not 0 < budget <= 1:
        raise ValueError(f"a budget is a share of the routed neurons in (0, 1]; found {budget}")
    layers = len(masked.experts)
    share = torch.full((layers,), budget)
    for _ in range(rounds):
        scores, realised = _sweep(masked, sequences, method)
        error = budget - realised
        if bool((error.abs() if by_layer else error.mean().abs()).max() < TOLERANCE) and bool(
            torch.isfinite(method.log_tau).all()
        ):
            break
        if bool(torch.isfinite(method.log_tau).all()):
            kept = torch.stack(
                [(layer >= tau).float().mean() for layer, tau in zip(scores, method.log_tau, strict=True)]
            )
            share = kept if by_layer else kept.mean().expand(layers)
        share = (share + (error if by_layer else error.mean())).clamp(0, 1)
        method = replace(method, log_tau=_quantiles(scores, share, by_layer))
    return method


def everything(layers: int) -> Tensor:
    """Thresholds [L] that drop nothing: where calibration starts."""
    return torch.full((layers,), -torch.inf)


def _quantiles(scores: Sequence[Tensor], share: Tensor, by_layer: bool) -> Tensor:
    if by_layer:
        return torch.stack([_cut(layer, float(part)) for layer, part in zip(scores, share, strict=True)])
    return _cut(torch.cat(list(scores)), float(share[0])).expand(len(scores)).clone()


def _cut(scores: Tensor, share: float) -> Tensor:
    """The score that `share` of all scores reach."""
    place = round((1 - share) * len(scores))
    return scores.kthvalue(min(max(place + 1, 1), len(scores))).values


def _sweep(
    masked: MaskedModel, sequences: Sequence[TokenSequence], method: ElasticMethod
) -> tuple[list[Tensor], Tensor]:
    """(scores of every layer on the method's own trajectory, realised budget [L])."""
    layers = len(masked.experts)
    gathered: list[list[Tensor]] = [[] for _ in range(layers)]
    spent, routed = torch.zeros(layers), torch.zeros(layers)
    tokens = sum(len(sequence.ids) for sequence in sequences)

    def visit(entering: LayerInput) -> Tensor:
        layer, rows = entering.layer, entering.rows
        slots = masked.slots(entering)
        cells = method.scores(slots).flatten()
        stride = max(1, tokens * cells.numel() // len(rows.x) // SCORES_A_LAYER)
        gathered[layer].append(cells[::stride])
        output, cost = masked.masked(method, entering, slots)
        spent[layer] += cost.sum()
        routed[layer] += rows.expert_ids.numel() * slots.activations.shape[2]
        return output

    for batch in batches(sequences):
        masked.run(token_ids(batch), visit)
    return [torch.cat(parts) for parts in gathered], spent / routed
