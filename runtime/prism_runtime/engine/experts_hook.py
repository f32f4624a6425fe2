"""The one adapter to transformers' experts interface (private API, transformers 5.23).

The fused experts of a model are packed into sub-expert-major weights, and the experts function "prism" is registered
and selected: OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V2, DeepSeek-V3 and GPT-OSS run unmodified around it. The
function sees neither its layer nor the plan, so both are bound to the experts module when it is packed.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from prism_runtime.kernels import huge_pages
from prism_runtime.kernels.contract import (
    REFERENCE,
    Activation,
    CompensationWeights,
    ExpertWeights,
    GatedLayer,
    GateWeights,
    SubExpertKernel,
    load_kernel,
)
from prism_runtime.kernels.plan import PlanTensor

IMPLEMENTATION = "prism"


class UnsupportedModel(ValueError):
    """The model has no experts that can be partitioned, or not as asked."""


class PackedLayer(nn.Module):
    """One layer's packed experts, a child of the experts module, and what the hook needs to run them."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None

    def __init__(self, weights: ExpertWeights, layer: int, kernel: SubExpertKernel) -> None:
        super().__init__()
        for name in ("w1", "w2", "b1", "b2"):
            # Not persistent: a state dict with both layouts could be loaded halfway.
            self.register_buffer(name, getattr(weights, name), persistent=False)
        self._activation = weights.activation
        self._layer = layer
        self._kernel = kernel
        self.plan: PlanTensor | None = None
        self.gated: GatedLayer | None = None
        self._residual_rms: Tensor | None = None

    def see_residual(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the block's norm, which runs right before the experts in the same forward."""
        if self.plan is not None and self.plan.gated_rows:
            self._residual_rms = residual_rms(inputs[0])

    def forward(self, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
        assert self.plan is not None, "bind_plan precedes every forward"
        weights = ExpertWeights(self.w1, self.w2, self.b1, self.b2, self._activation)
        rms, self._residual_rms = self._residual_rms, None
        return self._kernel(
            hidden, expert_ids, router_weights, self._layer, self.plan, weights, self.gated, residual_rms=rms
        )


def experts_modules(model: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """(decoder layer index, experts module) of every MoE layer, in order. Raises UnsupportedModel if there is none."""
    found = [
        (next(int(part) for part in name.split(".") if part.isdigit()), module)
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "gate_up_proj")
    ]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no fused experts that transformers dispatches; supported are "
            f"mixture-of-experts models with a gate and an up projection, such as Qwen3MoeForCausalLM"
        )
    return found


def block_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norm of every MoE layer whose input is the residual and whose output enters the router and the experts.

    Raises UnsupportedModel where a decoder layer does not name it as the supported architectures do.
    """
    norms = []
    for index, _ in experts_modules(model):
        norm = getattr(model.base_model.layers[index], "post_attention_layernorm", None)
        if norm is None:
            raise UnsupportedModel(
                f"layer {index} of {type(model).__name__} has no 'post_attention_layernorm' before its experts; "
                f"gates need the residual that enters it"
            )
        norms.append(norm)
    return norms


def residual_rms(residual: Tensor) -> Tensor:
    """[..., H] -> [T] float32: root mean square of the residual that enters a block's norm, one value a token."""
    return residual.detach().float().pow(2).mean(-1).sqrt().flatten()


def fused_projections(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Gate [E, C, H], up [E, C, H] and transposed down [E, C, H] of any Hugging Face layout: one row a neuron.

    Views where the layout allows, so nothing is copied until they are packed.
    """
    experts: Any = module
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, up = _split_gate_up(experts, gate_up, dim=1)
    return gate, up, down.transpose(1, 2)


def fused_biases(module: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gate [E, C], up [E, C] and down [E, H] biases, or None if the experts have none."""
    experts: Any = module
    if not experts.has_bias:
        return None
    return *_split_gate_up(experts, experts.gate_up_proj_bias.data, dim=1), experts.down_proj_bias.data


def activation_of(module: nn.Module) -> Activation:
    """The experts' activation as a function of (gate, up), whatever column order the model's own one wants."""
    experts: Any = module
    if type(experts)._apply_gate is _default_apply_gate:
        act_fn = experts.act_fn
        return lambda gate, up: act_fn(gate) * up
    if experts.is_concatenated:
        return lambda gate, up: experts._apply_gate(torch.cat((gate, up), -1))
    return lambda gate, up: experts._apply_gate(torch.stack((gate, up), -1).flatten(-2))


def pack(model: PreTrainedModel, sub_experts: int, kernel: str = REFERENCE) -> None:
    """Repack every experts module into `sub_experts` sub-experts and route its forward through the named kernel.

    Originals are freed layer by layer, so the peak is the model and one layer. Afterwards a stock implementation or
    `save_pretrained` would find empty weights; both are refused. Raises UnsupportedModel before anything is changed.
    """
    modules = experts_modules(model)
    for _, module in modules:
        _require_packable(module, sub_experts)
    run = load_kernel(kernel)
    for layer, (_, module) in enumerate(modules):
        module.add_module("prism", PackedLayer(pack_weights(module, sub_experts), layer, run))
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            if hasattr(module, name):
                setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    model.set_experts_implementation(IMPLEMENTATION)
    model.set_experts_implementation = _refuse_implementation
    model.save_pretrained = _refuse_save


def bind_plan(model: PreTrainedModel, plan: PlanTensor) -> None:
    """Give every packed layer the plan it reads. Repeat after `.to()`: it would leave the plan on the old device."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.plan = plan


def bind_gates(model: PreTrainedModel, layers: Sequence[GatedLayer]) -> None:
    """Give every packed layer its gate and compensation, on the model's device.

    A model without them pays nothing: only here is the residual watched, and only rows of gated points are measured.
    Raises ValueError if there is not one gate a layer or one does not fit its layer's sub-experts.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if len(packed) != len(layers):
        raise ValueError(f"there are gates for {len(layers)} MoE layers, the model has {len(packed)}")
    for index, (layer, gated, norm) in enumerate(zip(packed, layers, block_norms(model), strict=True)):
        experts, sub_experts, _, hidden = layer.w1.shape
        if gated.gate.weight.shape != (experts, sub_experts, hidden):
            raise ValueError(
                f"the gate of MoE layer {index} has shape {list(gated.gate.weight.shape)}, its sub-experts need "
                f"{[experts, sub_experts, hidden]}"
            )
        layer.gated = _gated_on(gated, layer.w1.device)
        norm.register_forward_pre_hook(layer.see_residual)


def _gated_on(gated: GatedLayer, device: torch.device) -> GatedLayer:
    gate = gated.gate
    return GatedLayer(
        GateWeights(
            gate.weight.to(device),
            gate.bias.to(device),
            gate.mean.to(device),
            gate.deviation.to(device),
            None if gate.token is None else gate.token.to(device),
            gate.kappa,
        ),
        {
            point: CompensationWeights(one.a.to(device), one.u.to(device), one.c.to(device))
            for point, one in gated.compensation.items()
        },
    )


def _forward(module: Any, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
    output: Tensor = module.prism(hidden, expert_ids, router_weights)
    return output


def _split_gate_up(experts: Any, fused: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if experts.is_concatenated:
        gate, up = fused.chunk(2, dim)
        return gate, up
    pairs = fused.unflatten(dim, (-1, 2))
    return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)


def _require_packable(module: nn.Module, sub_experts: int) -> None:
    experts: Any = module
    if not experts.has_gate or experts.has_post_expert_norm:
        raise UnsupportedModel(
            f"{type(module).__name__} has no gate projection or normalises each expert's output; "
            f"sub-experts need experts whose output is a sum over neurons"
        )
    if not experts.gate_up_proj.is_floating_point() or experts.gate_up_proj.element_size() < 2:
        raise UnsupportedModel(f"experts are stored as {experts.gate_up_proj.dtype}; load the model unquantised")
    neurons = fused_projections(module)[0].shape[1]
    if sub_experts < 1 or neurons % sub_experts:
        divisors = [n for n in range(1, neurons + 1) if neurons % n == 0 and n <= 64]
        raise UnsupportedModel(
            f"{neurons} neurons an expert cannot be cut into {sub_experts} equal sub-experts; possible: {divisors}"
        )


def pack_weights(module: nn.Module, sub_experts: int) -> ExpertWeights:
    gate, up, down = fused_projections(module)
    experts, neurons, hidden = gate.shape
    cut = (experts, sub_experts, neurons // sub_experts)
    w1 = huge_pages.empty((*cut[:2], 2 * cut[2], hidden), like=gate)
    torch.cat((gate.reshape(*cut, hidden), up.reshape(*cut, hidden)), 2, out=w1)
    w2 = huge_pages.empty((*cut, hidden), like=down).copy_(down.reshape(*cut, hidden))
    b1 = b2 = None
    if biases := fused_biases(module):
        b1 = torch.cat((biases[0].reshape(cut), biases[1].reshape(cut)), 2)
        b2 = biases[2].clone()
    return ExpertWeights(w1, w2, b1, b2, activation_of(module))


def _refuse_implementation(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the experts are packed into sub-experts; load the model again to use a stock implementation")


def _refuse_save(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the experts are packed into sub-experts and cannot be saved; copy the artifact instead")
