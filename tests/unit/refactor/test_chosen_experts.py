"""Searching some experts of a layer gives the rows that searching all of them gives, so tasks can be divided."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_runtime.refactor.layer_search import Limits, PartitionSettings, partition_layer

EXPERTS, NEURONS, HIDDEN, TOKENS = 4, 8, 6, 60
LIMITS = Limits((0.1, 1.0), (1.0, 1.0))


@dataclass
class Layer:
    """Both what the search reads of the experts and of the rows."""

    gate: Tensor
    up: Tensor
    down: Tensor
    x: Tensor
    rms: Tensor
    expert_ids: Tensor
    router_weights: Tensor

    def activations(self, rows: Tensor, expert: int) -> Tensor:
        return torch.nn.functional.silu(rows @ self.gate[expert].T) * (rows @ self.up[expert].T)


def layer() -> Layer:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = torch.randn(3, EXPERTS, NEURONS, HIDDEN, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(TOKENS, 2, generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    return Layer(gate, up, down, x, torch.ones(TOKENS), ids, weights)


def test_the_partition_of_chosen_experts_is_theirs_in_the_partition_of_all() -> None:
    found = layer()
    settings = PartitionSettings(sub_experts=4, proposals=200, seed=5)
    metric = torch.eye(HIDDEN)
    whole = partition_layer(found, found, metric, settings, limits=LIMITS, layer=1, threads=2)
    chosen = partition_layer(found, found, metric, settings, limits=LIMITS, layer=1, threads=1, chosen=[3, 1])
    assert torch.equal(chosen, whole[[3, 1]])
    assert len({tuple(row.tolist()) for row in whole}) == EXPERTS
