"""How much each neuron matters: router-weighted saliency, measured on text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_runtime.engine.experts_hook import activation_of, experts_modules, fused_biases, fused_projections
from prism_runtime.kernels.gating import ranks
from prism_runtime.refactor.partition import Saliency
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches, trace_experts


class _LayerSums:
    def __init__(self, module: nn.Module, top_k: int) -> None:
        self._gate, self._up, down = fused_projections(module)
        self._biases = fused_biases(module)
        self._activation = activation_of(module)
        self._down_norm = down.norm(dim=-1)
        experts, neurons = self._down_norm.shape
        self._sums = torch.zeros(2, experts, neurons, dtype=torch.float64)
        self._ranked = torch.zeros(top_k, experts, neurons, dtype=torch.float64)
        self._tokens = torch.zeros(experts, dtype=torch.int64)
        self._rows = 0

    def add(self, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> None:
        rank = ranks(router_weights)
        self._rows += len(hidden)
        for expert in expert_ids.unique().tolist():
            token, slot = torch.where(expert_ids == expert)
            contribution = self._activations(hidden[token], expert).abs() * self._down_norm[expert]
            energy = (contribution * router_weights[token, slot, None]).square()
            self._sums[0, expert] += energy.sum(0)
            self._ranked[:, expert].index_add_(0, rank[token, slot], energy.double())
            self._sums[1, expert] += contribution.square().sum(0)
            self._tokens[expert] += len(token)

    def _activations(self, rows: Tensor, expert: int) -> Tensor:
        gate, up = rows @ self._gate[expert].t(), rows @ self._up[expert].t()
        if self._biases:
            gate, up = gate + self._biases[0][expert], up + self._biases[1][expert]
        return self._activation(gate, up)

    def mean(self) -> Saliency:
        energy, power = (self._sums / self._tokens.clamp(min=1)[:, None]).float()
        return Saliency(energy, (self._ranked / max(self._rows, 1)).float(), power, self._tokens)


def calibrate(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], advance: Callable[[int], None] = lambda _: None
) -> list[Saliency]:
    """Saliency of every MoE layer. Holds sums only, never the activations of more than one expert and batch.

    `advance` is told the number of sequences after each batch.
    """
    top_k = model.config.get_text_config().num_experts_per_tok
    layers = [_LayerSums(module, top_k) for _, module in experts_modules(model)]

    def visit(layer: int, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> None:
        layers[layer].add(hidden, expert_ids, router_weights)

    for batch in batches(sequences):
        trace_experts(model, batch, visit)
        advance(len(batch))
    return [layer.mean() for layer in layers]
