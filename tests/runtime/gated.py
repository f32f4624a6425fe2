"""Made-up gates of the right shapes: what a recipe would fit, for tests of what runs it."""

import torch

from prism_api.manifest import Shape
from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.refactor.sidecar import GatedPoint, GatedRecipe

RANK = 3


def made_up_gates(shape: Shape, seed: int = 0, kappa: float | None = 1.7, sensitive: bool = True) -> list[GateWeights]:
    """One gate a layer, its weights exact in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    cells = (shape.experts, shape.sub_experts)
    return [
        GateWeights(
            weight=(torch.randn(*cells, shape.hidden, generator=draw) / 8).bfloat16().float(),
            bias=torch.randn(cells, generator=draw),
            mean=torch.randn(cells, generator=draw),
            deviation=torch.rand(cells, generator=draw) + 0.5,
            token=torch.randn(shape.hidden + 3, generator=draw) / 8 if sensitive else None,
            kappa=kappa,
        )
        for _ in shape.moe_layers
    ]


def made_up_recipe(shape: Shape, seed: int = 0) -> GatedRecipe:
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
        points={
            0: GatedPoint(torch.zeros(layers), compensation=compensation, cap=6),
            1: GatedPoint(torch.zeros(layers), share=torch.full((layers,), 0.5)),
        },
    )
