"""A stock model whose experts can lose neurons: the forward that fits and measures every `Method`.

Experts run in float32 from their unpacked weights, all neurons of every routed expert, and what a method drops is
zeroed before the down projection. That is slow and exact, and knows nothing of kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_runtime.engine.experts_hook import (
    activation_of,
    block_norms,
    experts_modules,
    fused_biases,
    fused_projections,
    residual_rms,
)
from prism_runtime.kernels.contract import Activation
from prism_runtime.refactor.method import Method, Slots
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches


@dataclass(frozen=True, slots=True)
class Experts:
    """One MoE layer's experts, one row a neuron: gate, up and down [E, C, H] float32; biases (gate [E, C], up [E, C],
    down [E, H]) or None."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    activation: Activation

    def permuted(self, perm: Tensor) -> "Experts":
        """Neuron `perm[e, i]` of this stands at position i of the result; perm [E, C]."""
        order = perm.long()
        rows = order[:, :, None].expand_as(self.gate)
        biases = self.biases and (self.biases[0].gather(1, order), self.biases[1].gather(1, order), self.biases[2])
        return replace(
            self,
            gate=self.gate.gather(1, rows),
            up=self.up.gather(1, rows),
            down=self.down.gather(1, rows),
            biases=biases,
        )

    def activations(self, rows: Tensor, expert: int) -> Tensor:
        """[R, H] -> [R, C]: every neuron of one expert before the down projection."""
        gate, up = rows @ self.gate[expert].t(), rows @ self.up[expert].t()
        if self.biases:
            gate, up = gate + self.biases[0][expert], up + self.biases[1][expert]
        return self.activation(gate, up)


@dataclass(frozen=True, slots=True)
class LayerRows:
    """What enters one MoE layer's experts on a text, in the order of the text.

    x               [T, H]  float32
    rms             [T]     root mean square of the residual before the block's norm
    expert_ids      [T, K]  int64
    router_weights  [T, K]  float32
    """

    x: Tensor
    rms: Tensor
    expert_ids: Tensor
    router_weights: Tensor

    def select(self, tokens: Tensor | slice) -> "LayerRows":
        """The rows of some tokens, by index, mask or slice."""
        return LayerRows(self.x[tokens], self.rms[tokens], self.expert_ids[tokens], self.router_weights[tokens])

    def routed(self, expert: int) -> tuple[Tensor, Tensor]:
        """(token, slot) of every row that was routed to the expert."""
        token, slot = torch.where(self.expert_ids == expert)
        return token, slot


@dataclass(frozen=True, slots=True)
class LayerInput:
    """`rows` of one forward at MoE layer `layer`, and the residual [T, H] that the layer's output will be added to."""

    layer: int
    rows: LayerRows
    residual: Tensor


Visit = Callable[[LayerInput], Tensor]
"""Returns the experts' output [T, H]."""


def layer_experts(model: PreTrainedModel) -> list[Experts]:
    """The experts of every MoE layer: views of a float32 model's weights, copies of any other's.

    Raises UnsupportedModel if there is none.
    """
    return [_unpacked(module) for _, module in experts_modules(model)]


def activations_of_slots(experts: Experts, rows: LayerRows) -> Tensor:
    """[T, K, C]: activations of every routed expert."""
    result = rows.x.new_empty(*rows.expert_ids.shape, experts.down.shape[1])
    for expert in rows.expert_ids.unique().tolist():
        token, slot = rows.routed(expert)
        result[token, slot] = experts.activations(rows.x[token], expert)
    return result


def combine(experts: Experts, rows: LayerRows, activations: Tensor, router_weights: Tensor) -> Tensor:
    """[T, H]: the layer's output from activations [T, K, C], zero where dropped. A down bias is never dropped."""
    output = torch.zeros_like(rows.x)
    for expert in rows.expert_ids.unique().tolist():
        token, slot = rows.routed(expert)
        contribution = activations[token, slot] @ experts.down[expert]
        if experts.biases:
            contribution += experts.biases[2][expert]
        output.index_add_(0, token, contribution * router_weights[token, slot, None])
    return output


class MaskedModel:
    """A stock model, at full budget or under a method. The model is left as it was between calls.

    source   experts as the model has them, in its memory
    experts  the same in the order of the last partition: beside the model, one copy of the experts at most
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModel for a model without supported experts."""
        self._model = model
        self._modules = [module for _, module in experts_modules(model)]
        self._norms = block_norms(model)
        self.source: Sequence[Experts] = layer_experts(model)
        self.experts = list(self.source)
        self.reset()

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    def permute(self, perms: Sequence[Tensor]) -> None:
        """Put every expert's neurons in the order of a partition of the source, [E, C] a layer."""
        for layer, (source, perm) in enumerate(zip(self.source, perms, strict=True)):
            self.experts[layer] = source  # lets go of this layer's last order before the next one is made
            if not torch.equal(perm.long(), torch.arange(perm.shape[1]).expand_as(perm)):
                self.experts[layer] = source.permuted(perm)

    def reset(self) -> None:
        """Forget what earlier calls cost."""
        self._spent = [0.0] * len(self._modules)
        self._routed = [0] * len(self._modules)

    @property
    def realised(self) -> float:
        """Budget that the calls since `reset` used: kept neurons and extras over routed neurons."""
        return sum(self._spent) / max(sum(self._routed), 1)

    @property
    def realised_by_layer(self) -> list[float]:
        return [spent / max(routed, 1) for spent, routed in zip(self._spent, self._routed, strict=True)]

    @torch.inference_mode()
    def log_probabilities(self, batch: Sequence[TokenSequence], method: Method | None = None) -> Tensor:
        """[B, S, vocabulary] float32 of the next token after every position; None runs every neuron."""
        with self._visited(self.full if method is None else partial(self._run_method, method)):
            return self._model(token_ids(batch), use_cache=False).logits.float().log_softmax(-1)

    @torch.inference_mode()
    def run(self, ids: Tensor, visit: Visit) -> None:
        """Run [B, S] tokens through the layers, without logits, `visit` in place of every MoE layer's experts."""
        with self._visited(visit):
            self._model.base_model(ids, use_cache=False)

    def full(self, entering: LayerInput) -> Tensor:
        """Every neuron of every routed expert."""
        experts, rows = self.experts[entering.layer], entering.rows
        return combine(experts, rows, activations_of_slots(experts, rows), rows.router_weights)

    def slots(self, entering: LayerInput) -> Slots:
        """What a method sees of a layer."""
        experts, rows = self.experts[entering.layer], entering.rows
        activations = activations_of_slots(experts, rows)
        return Slots(entering.layer, rows.x, rows.rms, rows.expert_ids, rows.router_weights, activations, experts.down)

    def masked(self, method: Method, entering: LayerInput, slots: Slots | None = None) -> tuple[Tensor, Tensor]:
        """(output [T, H] with what the method adds, cost [T] in neurons) of one layer; its slots if at hand."""
        slots = slots or self.slots(entering)
        choice = method.choose(slots)
        kept = slots.activations * choice.keep
        output = combine(self.experts[entering.layer], entering.rows, kept, choice.router_weights)
        if choice.added is not None:
            output += choice.added
        return output, choice.keep.sum((1, 2)) + choice.extra

    def _run_method(self, method: Method, entering: LayerInput) -> Tensor:
        output, cost = self.masked(method, entering)
        self._spent[entering.layer] += float(cost.sum())
        self._routed[entering.layer] += entering.rows.expert_ids.numel() * self.experts[entering.layer].down.shape[1]
        return output

    @contextmanager
    def _visited(self, visit: Visit) -> Iterator[None]:
        residuals: list[Tensor | None] = [None] * len(self._modules)

        def before_norm(layer: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            residuals[layer] = inputs[0].detach().flatten(0, -2)

        def forward(layer: int, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
            residual = residuals[layer]
            assert residual is not None, "the norm runs before the experts"
            rows = LayerRows(hidden.float(), residual_rms(residual), expert_ids, router_weights.float())
            return visit(LayerInput(layer, rows, residual.float())).to(hidden.dtype)

        hooks = [norm.register_forward_pre_hook(partial(before_norm, layer)) for layer, norm in enumerate(self._norms)]
        try:
            for layer, module in enumerate(self._modules):
                module.forward = partial(forward, layer)
            yield
        finally:
            for module in self._modules:
                vars(module).pop("forward", None)
            for hook in hooks:
                hook.remove()


def capture(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], advance: Callable[[int], None] = lambda _: None
) -> list[LayerRows]:
    """What enters every MoE layer of the full model on a text, all tokens. `advance` is told of finished sequences."""
    masked = MaskedModel(model)
    gathered: list[list[LayerRows]] = [[] for _ in masked.experts]

    def visit(entering: LayerInput) -> Tensor:
        gathered[entering.layer].append(entering.rows)
        return masked.full(entering)

    for batch in batches(sequences):
        masked.run(token_ids(batch), visit)
        advance(len(batch))
    return [
        LayerRows(
            torch.cat([part.x for part in parts]),
            torch.cat([part.rms for part in parts]),
            torch.cat([part.expert_ids for part in parts]),
            torch.cat([part.router_weights for part in parts]),
        )
        for parts in gathered
    ]


def _unpacked(module: nn.Module) -> Experts:
    gate, up, down = (_rows_at_hand(projection.float()) for projection in fused_projections(module))
    biases = fused_biases(module)
    if biases is not None:
        biases = (biases[0].float(), biases[1].float(), biases[2].float())
    return Experts(gate, up, down, biases, activation_of(module))


def _rows_at_hand(projection: Tensor) -> Tensor:
    """The projection, copied only where neither its rows nor its columns are contiguous: products would copy it."""
    return projection if 1 in projection.stride()[1:] else projection.contiguous()


def token_ids(batch: Sequence[TokenSequence]) -> Tensor:
    """[B, S] int64."""
    return torch.tensor([sequence.ids for sequence in batch])
