"""How much the model minds an error in an MoE layer's output: by direction (the Fisher metric) and by token.

The KL to the full model is, to second order, half the error's square in the Fisher information of the output. Its
expectation over the model's own predictions is the second moment of the gradients of log p(target) for targets sampled
from the model, so no labels are needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_runtime.engine.experts_hook import block_norms, experts_modules, fused_projections, residual_rms
from prism_runtime.refactor.masked import token_ids
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches

MASSIVE = 5.0
"""Tokens whose residual is this many times the median are left out of every fit."""


@dataclass(frozen=True, slots=True)
class LayerMetric:
    """Of one MoE layer.

    form   [H, H]  float32, mean of (R G)(R G)' over tokens: R rms of the residual, G gradient at the layer's output
    power  [T]     float32, mean over samples of |G|^2 at every token of the text
    """

    form: Tensor
    power: Tensor


def ordinary(rms: Tensor) -> Tensor:
    """[T] bool: tokens without massive activations. A few first positions would else outweigh a whole text."""
    return rms < MASSIVE * rms.median()


def identity_metric(layers: int, hidden: int, tokens: int) -> list[LayerMetric]:
    """Every direction and token counts alike: for models too large to run backwards."""
    return [LayerMetric(torch.eye(hidden), torch.ones(tokens)) for _ in range(layers)]


def fisher_metric(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    seed: int,
    samples: int = 4,
    advance: Callable[[int], None] = lambda _: None,
) -> list[LayerMetric]:
    """The metric of every MoE layer from `samples` targets at every position. Needs the model's backward pass."""
    modules = [module for _, module in experts_modules(model)]
    hidden = fused_projections(modules[0])[0].shape[2]
    forms = [torch.zeros(hidden, hidden, dtype=torch.float64) for _ in modules]
    counted = [0] * len(modules)
    powers: list[list[Tensor]] = [[] for _ in modules]
    generator = torch.Generator().manual_seed(seed)
    for batch in batches(sequences, size=4):
        gradients, rms = _gradients(model, token_ids(batch), samples, generator)
        for layer, gradient in enumerate(gradients):
            powers[layer].append(gradient.square().sum(-1).mean(0))
            kept = ordinary(rms[layer])
            scaled = (gradient * rms[layer][:, None])[:, kept].flatten(0, 1)
            forms[layer] += (scaled.t() @ scaled).double()
            counted[layer] += len(scaled)
        advance(len(batch))
    return [
        LayerMetric((form / count).float(), torch.cat(power))
        for form, count, power in zip(forms, counted, powers, strict=True)
    ]


def _gradients(
    model: PreTrainedModel, ids: Tensor, samples: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """([S, T, H], [T]) of every MoE layer: gradients of the text's log p(target) at the experts' output, and R."""
    modules = [module for _, module in experts_modules(model)]
    shifts: list[Tensor] = []
    rms: list[Tensor] = []

    def before_norm(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        rms.append(residual_rms(inputs[0]))

    def after_experts(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        # Weights are frozen here, so a zero is what the gradient is taken at.
        shift = torch.zeros_like(output, requires_grad=True)
        shifts.append(shift)
        return output + shift

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [norm.register_forward_pre_hook(before_norm) for norm in block_norms(model)]
    hooks += [module.register_forward_hook(after_experts) for module in modules]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            log_p = model(ids, use_cache=False).logits.float().log_softmax(-1)
        sampled = partial(_sampled_gradients, log_p, shifts, generator)
        drawn = [sampled(keep_graph=sample < samples - 1) for sample in range(samples)]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return [torch.stack([draw[layer].float() for draw in drawn]) for layer in range(len(modules))], rms


def _sampled_gradients(
    log_p: Tensor, shifts: Sequence[Tensor], generator: torch.Generator, keep_graph: bool
) -> tuple[Tensor, ...]:
    targets = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
    chosen = log_p.flatten(0, 1).gather(1, targets).sum()
    return torch.autograd.grad(chosen, list(shifts), retain_graph=keep_graph)
