"""Thresholds that spend a budget: quantiles of the scores, corrected on the sparse trajectory.

What a layer drops changes what the next one sees, and compensation and an adaptive gate cost what depends on the
threshold, so the quantile that meets the budget is found by running the method and looking.
"""

from collections.abc import Sequence
from itertools import count
from math import gcd
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from prism_runtime.refactor.masked import LayerInput, MaskedModel, token_ids
from prism_runtime.refactor.method import Method, Slots
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches

TOLERANCE = 5e-4
"""Of the realised budget over all layers; a layer that has a threshold of its own may miss by four times as much."""
SCORES_A_LAYER = 2_000_000


class Thresholded(Method, Protocol):
    """A method that keeps cells whose score reaches its layer's threshold; a cell is a sub-expert, or a neuron."""

    log_tau: Tensor

    @property
    def price(self) -> float:
        """Part of a cell's multiply-adds that is saved by dropping it."""
        ...

    def scores(self, slots: Slots) -> Tensor:
        """[T, K, cells]"""
        ...

    def at(self, log_tau: Tensor) -> Self:
        """The same method at other thresholds [L]."""
        ...


AnyThresholded = TypeVar("AnyThresholded", bound=Thresholded)


def calibrate_thresholds(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: AnyThresholded,
    budget: float | Tensor,
    *,
    by_layer: bool = False,
    rounds: int = 4,
) -> AnyThresholded:
    """The method with the `log_tau` [L] at which its realised budget on the text is `budget`, all costs counted.

    budget    of all layers, or of each [L], which needs `by_layer`
    by_layer  every layer spends its budget, by a threshold of its own; else one threshold serves all layers, and layers
              whose errors matter more keep more
    rounds    sweeps over the text: the first finds the thresholds of the trajectory that the method comes with

    Raises ValueError for a budget that choosing alone would exceed.
    """
    budgets = torch.as_tensor(budget)
    if not bool(((budgets > 0) & (budgets <= 1)).all()):
        raise ValueError(f"a budget is a share of the routed neurons in (0, 1]; found {budget}")
    layers = len(masked.experts)
    for sweep in range(rounds):
        scores, realised = _sweep(masked, sequences, method)
        error = budgets - realised
        farthest = error.abs().max() if by_layer else error.mean().abs()
        if error.mean().abs() < TOLERANCE and farthest < 4 * TOLERANCE and torch.isfinite(method.log_tau).all():
            break
        kept = torch.stack([_kept(*each) for each in zip(scores, method.log_tau, strict=True)])
        choosing = float((realised - kept * method.price).mean())
        if sweep == 0 and float(budgets.mean()) < choosing:
            raise ValueError(f"budget {float(budgets.mean()):.3f} is below {choosing:.3f}, what choosing alone costs")
        wanted = kept + error / method.price
        share = wanted if by_layer else wanted.mean().expand(layers)
        method = method.at(_quantiles(scores, share.clamp(0, 1), by_layer))
    return method


def everything(layers: int) -> Tensor:
    """Thresholds [L] that drop nothing: where calibration starts."""
    return torch.full((layers,), -torch.inf)


def _quantiles(scores: Sequence[Tensor], share: Tensor, by_layer: bool) -> Tensor:
    if by_layer:
        return torch.stack([_cut(layer, float(part)) for layer, part in zip(scores, share, strict=True)])
    return _cut(torch.cat(list(scores)), float(share[0])).expand(len(scores)).clone()


def _kept(scores: Tensor, tau: Tensor) -> Tensor:
    """Share of a layer's cells that run; what scores nothing never does."""
    return ((scores >= tau) & scores.isfinite()).float().mean()


def _cut(scores: Tensor, share: float) -> Tensor:
    """The score that `share` of all scores reach."""
    place = round((1 - share) * len(scores))
    return scores.kthvalue(min(max(place + 1, 1), len(scores))).values


def _sweep(masked: MaskedModel, sequences: Sequence[TokenSequence], method: Thresholded) -> tuple[list[Tensor], Tensor]:
    """(scores of every layer on the method's own trajectory, realised budget [L])."""
    layers = len(masked.experts)
    gathered: list[list[Tensor]] = [[] for _ in range(layers)]
    spent, routed = torch.zeros(layers), torch.zeros(layers)
    tokens = sum(len(sequence.ids) for sequence in sequences)

    def visit(entering: LayerInput) -> Tensor:
        layer, rows = entering.layer, entering.rows
        slots = masked.slots(entering)
        cells = method.scores(slots)
        gathered[layer].append(cells.flatten()[:: _stride(tokens * cells[0].numel(), cells.shape[2])])
        output, cost = masked.masked(method, entering, slots)
        spent[layer] += cost.sum()
        routed[layer] += rows.expert_ids.numel() * slots.activations.shape[2]
        return output

    for batch in batches(sequences):
        masked.run(token_ids(batch), visit)
    return [torch.cat(parts) for parts in gathered], spent / routed


def _stride(found: int, cells: int) -> int:
    """That leaves SCORES_A_LAYER of the scores found; one that shares no factor with an expert's cells sees each."""
    return next(each for each in count(max(1, found // SCORES_A_LAYER)) if gcd(each, cells) == 1)
