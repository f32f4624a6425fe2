"""Made-up gates of the right shapes: what a recipe would fit, for tests of what runs it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_api.manifest import Shape
from prism_runtime.kernels.contract import CompensationWeights, GatedLayer, GateWeights
from prism_runtime.refactor.sidecar import GatedPoint, GatedRecipe

RANK = 3


@dataclass(frozen=True)
class Gate:
    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor


def made_up_gates(shape: Shape, seed: int = 0) -> list[Gate]:
    """One gate a layer, its weights exact in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    cells = (shape.experts, shape.sub_experts)
    return [
        Gate(
            weight=(torch.randn(*cells, shape.hidden, generator=draw) / 8).bfloat16().float(),
            bias=torch.randn(cells, generator=draw),
            mean=torch.randn(cells, generator=draw),
            deviation=torch.rand(cells, generator=draw) + 0.5,
        )
        for _ in shape.moe_layers
    ]


def made_up_recipe(shape: Shape, tau: float = 0.0, seed: int = 0) -> GatedRecipe:
    """Point 0 by threshold with compensation, point 1 by batch; the others stay prefixes."""
    draw, layers = torch.Generator().manual_seed(seed), len(shape.moe_layers)
    compensation = [
        CompensationWeights(
            a=torch.randn(shape.hidden + 1, RANK, generator=draw) / 50,
            u=torch.randn(RANK, shape.hidden, generator=draw) / 50,
            c=torch.randn(shape.experts, shape.sub_experts, RANK, generator=draw) / 50,
        )
        for _ in shape.moe_layers
    ]
    return GatedRecipe(
        gates=made_up_gates(shape, seed),
        token_factors=[torch.randn(shape.hidden + 3, generator=draw) / 8 for _ in shape.moe_layers],
        points={
            0: GatedPoint(torch.full((layers,), tau), compensation=compensation, cap=6),
            1: GatedPoint(torch.zeros(layers), share=torch.full((layers,), 0.5)),
        },
    )


def gated_layers(shape: Shape, seed: int = 0) -> list[GatedLayer]:
    """The gates alone, as the runtime takes them: every output is evaluated, nothing is compensated."""
    return [
        GatedLayer(GateWeights(gate.weight, gate.bias, gate.mean, gate.deviation, None, None), {})
        for gate in made_up_gates(shape, seed)
    ]
