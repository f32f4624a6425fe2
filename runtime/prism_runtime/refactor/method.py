"""The seam between what selects sub-experts offline and what measures it.

A method looks at one MoE layer's batch and says which neurons run, with which router weights, what it adds for those
that do not, and what all that costs. Recipes, baselines and oracles are methods; the masked forward, the evaluation and
the reports know nothing else about them.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    """One MoE layer's batch: T tokens with K routed experts each, neurons in the order of the partition.

    layer           index counted over MoE layers
    x               [T, H]     what enters the experts, after the block's norm
    rms             [T]        root mean square of the residual before that norm
    expert_ids      [T, K]     int64
    router_weights  [T, K]     as the router scaled them
    activations     [T, K, C]  output of every neuron before the down projection, without the router weight
    down            [E, C, H]  the down projection, one row a neuron
    """

    layer: int
    x: Tensor
    rms: Tensor
    expert_ids: Tensor
    router_weights: Tensor
    activations: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a layer's batch runs.

    keep            [T, K, C]  bool
    router_weights  [T, K]     weights of the experts' outputs; those of `Slots` unless the method renormalises
    added           [T, H]     added to the layer's output in place of what was dropped, or None
    extra           [T]        cost beside the kept neurons (gate, compensation), in neurons: one is 3H multiply-adds
    """

    keep: Tensor
    router_weights: Tensor
    added: Tensor | None
    extra: Tensor


class Method(Protocol):
    """One way to spend an activation budget, at one budget.

    The realised budget is (kept neurons + extra) / (K C), averaged over tokens and layers.
    """

    name: str

    def choose(self, slots: Slots) -> Choice: ...
