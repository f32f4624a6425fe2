"""Spending one budget over layers by what each layer's share costs in quality: a grouped knapsack.

A single threshold compares predicted output errors of different layers in one unit, and is only as good as that unit.
Here the unit is measured: each layer alone runs at each of a few budgets, on held-out text, and the divergence from the
full model is its loss. Layers are then taken to add up. What a layer does to sparse layers after it is not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_runtime.kernels.contract import GateWeights
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.masked import LayerInput, MaskedModel, token_ids
from prism_runtime.refactor.memory import EVALUATION_BATCH
from prism_runtime.refactor.method import Choice, Slots
from prism_runtime.refactor.progress import Advance
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a layer's cells that are measured; between them the logarithm of the loss is taken to be straight."""
SEQUENCES = 24
"""That a layer is measured on at every level: a layer's losses differ by far more than their error."""
STEP = 0.025
"""Budgets of layers are multiples of it, and so is the smallest."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """`loss` [L, Q] in nats a token of running one layer alone at `budget` [L, Q], its realised share; Q ascending."""

    budget: Floats
    loss: Floats

    def on_grid(self) -> Floats:
        """[L, G]: losses at STEP, 2 STEP, ... 1; less budget never loses less, and a whole layer loses nothing."""
        grid = STEP * np.arange(1, round(1 / STEP) + 1)
        smallest = np.finfo(np.float64).tiny
        curves = []
        for budget, loss in zip(self.budget, self.loss, strict=True):
            falling = np.maximum.accumulate(loss[::-1])[::-1].clip(min=smallest)
            slope = np.log(falling[1] / falling[0]) / max(budget[1] - budget[0], 1e-9)
            below = np.log(falling[0]) + slope * (grid - budget[0])  # goes on as between the first two
            curve = np.where(grid < budget[0], below, np.interp(grid, budget, np.log(falling)))
            curves.append(np.where(grid >= 1 - STEP / 2, 0.0, np.exp(curve)))
        return np.array(curves)


def allocate(loss: Floats, units: int) -> list[int]:
    """The level of each layer, counted from 0, that minimises the sum of `loss` [L, G] at `units` in all.

    Level g costs g + 1 units. Exact, in O(L units G). Raises ValueError unless every layer can have one unit and none
    gets more than all.
    """
    layers, levels = loss.shape
    if not layers <= units <= layers * levels:
        raise ValueError(f"{layers} layers of 1 to {levels} units each cannot spend {units}")
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    chosen = np.zeros((layers, units + 1), dtype=np.int64)
    for layer in range(layers):
        reached = np.full((levels, units + 1), np.inf)
        for level in range(min(levels, units)):
            reached[level, level + 1 :] = best[: units - level] + loss[layer, level]
        chosen[layer] = reached.argmin(0)
        best = reached.min(0)
    found: list[int] = []
    for layer in reversed(range(layers)):
        level = int(chosen[layer, units])
        found.append(level)
        units -= level + 1
    return found[::-1]


def layer_budgets(losses: LayerLosses, budget: float) -> Tensor:
    """[L]: the budget of every layer, whose mean is `budget` up to half a step of one layer."""
    loss = losses.on_grid()
    layers, levels = loss.shape
    units = min(max(round(budget * layers / STEP), layers), layers * levels)
    return torch.tensor([STEP * (level + 1) for level in allocate(loss, units)])


def measured_text(sequences: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
    """About SEQUENCES of them, taken evenly so that every domain is among them."""
    return sequences[:: -(-len(sequences) // SEQUENCES)]


def measure_losses(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    gates: Sequence[GateWeights],
    advance: Advance = lambda _: None,
) -> LayerLosses:
    """Run every layer alone at each of LEVELS, without compensation. `advance` is told of sequences."""
    text = measured_text(sequences)
    thresholds = _thresholds(masked, text, gates)
    budget, loss = np.zeros(thresholds.shape), np.zeros(thresholds.shape)
    parts = list(batches(text, size=EVALUATION_BATCH))
    for batch in parts:
        full = masked.log_probabilities(batch)
        for layer, level in np.ndindex(*thresholds.shape):
            tau = torch.full((len(thresholds),), -torch.inf)
            tau[layer] = thresholds[layer, level]
            masked.reset()
            found = masked.log_probabilities(batch, _Alone(ElasticMethod(gates, tau), layer))
            share = len(batch) / len(text)
            loss[layer, level] += share * float((full.exp() * (full - found)).sum(-1).mean())
            budget[layer, level] += share * masked.realised_by_layer[layer]
            advance(len(batch))
    masked.reset()
    return LayerLosses(budget, loss)


class _Alone:
    """A method at one layer, and every neuron at all others."""

    name = "one layer"

    def __init__(self, method: ElasticMethod, layer: int) -> None:
        self._method, self._layer = method, layer

    def choose(self, slots: Slots) -> Choice:
        if slots.layer == self._layer:
            return self._method.choose(slots)
        keep = torch.ones_like(slots.activations, dtype=torch.bool)
        return Choice(keep, slots.router_weights, None, torch.zeros(len(slots.x)))


def _thresholds(masked: MaskedModel, text: Sequence[TokenSequence], gates: Sequence[GateWeights]) -> Tensor:
    """[L, Q]: the scores that LEVELS of a layer's cells reach, on the full model's trajectory."""
    method = ElasticMethod(gates, torch.full((len(gates),), -torch.inf))
    scores: list[list[Tensor]] = [[] for _ in gates]

    def visit(entering: LayerInput) -> Tensor:
        scores[entering.layer].append(method.scores(masked.slots(entering)).flatten())
        return masked.full(entering)

    for batch in batches(text):
        masked.run(token_ids(batch), visit)
    found = []
    for parts in scores:
        ranked = torch.cat(parts).sort().values
        found.append(torch.stack([ranked[round((1 - level) * (len(ranked) - 1))] for level in LEVELS]))
    return torch.stack(found)
