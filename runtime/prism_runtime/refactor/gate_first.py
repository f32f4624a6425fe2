"""Neuron by neuron: the whole gate projection runs, and the up and down projections of the neurons that it opens.

A neuron's output is a function of its gate times a function of its up projection. Where the first is small the neuron
says little whatever the second is, so the gate chooses better than any prediction does; but it costs a third of the
expert for every token, and the neurons it keeps lie scattered: fewer multiply-adds, no contiguous slices. It measures
what finer selection could give (compare CATS, arXiv:2404.08763).
"""

from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor

from prism_runtime.refactor.baselines import ThresholdGate
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.masked import Experts, LayerRows
from prism_runtime.refactor.method import Choice, Slots
from prism_runtime.refactor.metric import ordinary

GATE_SHARE = 1 / 3
"""Of an expert's multiply-adds: gate, up and down projection are of one size."""

MOST_ROWS = 2048
"""For the mean of one number a neuron."""


class GateFirst(ThresholdGate):
    """Keeps a neuron iff its gate's output, times the up projection's usual size, reaches the layer's threshold.

    experts  the layers' weights, neurons in the order of the model that is masked
    rows     calibration rows, for the up projection's mean square
    metric   for each layer [H, H]
    """

    price = 1 - GATE_SHARE

    def __init__(
        self, name: str, experts: Sequence[Experts], rows: Sequence[LayerRows], metric: Sequence[Tensor]
    ) -> None:
        count, neurons = experts[0].gate.shape[:2]
        super().__init__(name, [torch.arange(neurons).expand(count, neurons)] * len(experts), neurons)
        self._experts = experts
        self._log_sizes = [_log_sizes(*layer) for layer in zip(experts, rows, metric, strict=True)]

    def log_scores(self, slots: Slots) -> Tensor:
        experts = self._experts[slots.layer]
        scores = torch.empty_like(slots.activations)
        for expert in slots.expert_ids.unique().tolist():
            token, rank = torch.where(slots.expert_ids == expert)
            opening = _opening(experts, expert, slots.x[token]).abs().clamp_min(1e-15).log()
            factor = slots.router_weights[token, rank].log() - slots.rms[token].log()
            scores[token, rank] = opening + self._log_sizes[slots.layer][expert] + factor[:, None]
        return scores

    def scores(self, slots: Slots) -> Tensor:
        return self.log_scores(slots)

    def at(self, log_tau: Tensor) -> Self:
        """The same method at other thresholds [L]."""
        other = copy(self)
        other.log_tau = log_tau
        return other

    def keep(self, slots: Slots, sub_experts: Tensor) -> Choice:
        saved = GATE_SHARE * (~sub_experts).sum((1, 2))
        return Choice(keep=sub_experts, router_weights=slots.router_weights, added=None, extra=saved)


class SlicesThenNeurons(GateFirst):
    """Whole sub-experts drop out by their predicted norms, and only the others' gate projection runs.

    A neuron then runs iff its sub-expert does and its own score reaches the threshold. Against `GateFirst` this saves
    the gate rows of sub-experts in which hardly a neuron would run.

    slices  cuts the experts; its thresholds say which sub-experts stay, and it pays for their prediction
    """

    def __init__(
        self,
        name: str,
        experts: Sequence[Experts],
        rows: Sequence[LayerRows],
        metric: Sequence[Tensor],
        slices: ElasticMethod,
    ) -> None:
        super().__init__(name, experts, rows, metric)
        self._slices = slices

    def log_scores(self, slots: Slots) -> Tensor:
        surviving, _ = self._surviving(slots)
        return super().log_scores(slots).masked_fill(~surviving, -torch.inf)

    def keep(self, slots: Slots, sub_experts: Tensor) -> Choice:
        surviving, cost = self._surviving(slots)
        kept = sub_experts & surviving
        saved = GATE_SHARE * (surviving & ~kept).sum((1, 2))
        return Choice(keep=kept, router_weights=slots.router_weights, added=None, extra=saved + cost)

    def _surviving(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """(neurons [T, K, C] of the sub-experts that stay, cost [T] of choosing those)."""
        cells, cost = self._slices.cells(slots)
        return cells.repeat_interleave(slots.activations.shape[2] // cells.shape[2], dim=2), cost


def _opening(experts: Experts, expert: int, x: Tensor) -> Tensor:
    """The gate's factor of each neuron's output, [R, C]: the output if the up projection gave one."""
    gate = x @ experts.gate[expert].t()
    if experts.biases:
        gate = gate + experts.biases[0][expert]
    return experts.activation(gate, torch.ones_like(gate))


def _log_sizes(experts: Experts, rows: LayerRows, metric: Tensor) -> Tensor:
    """[E, C]: log of the norm that a neuron adds to the output when its gate's factor is one."""
    usual = rows.select(ordinary(rows.rms))
    sizes = (experts.down @ metric * experts.down).sum(-1)
    for expert in range(len(sizes)):
        tokens = usual.routed(expert)[0][:MOST_ROWS]
        if not len(tokens):
            continue  # never routed to: any size does
        up = usual.x[tokens] @ experts.up[expert].t()
        if experts.biases:
            up = up + experts.biases[1][expert]
        one = torch.ones_like(up)
        sizes[expert] *= (experts.activation(one, up) / experts.activation(one, one)).square().mean(0)
    return 0.5 * sizes.clamp_min(1e-30).log()
