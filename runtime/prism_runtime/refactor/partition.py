"""Which neurons form which sub-expert. Pure: tensors in, tensors out."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Saliency:
    """One MoE layer, E experts of C neurons; means over the tokens routed to an expert, 0 if it got none.

    energy  [E, C]  (g * |h| * ||w_down||)^2: router weight, activation, norm of the neuron's row of the down projection
    ranked  [K, E, C]  the same, summed over the tokens whose router ranked the expert first, second, ..., and divided
                    by all tokens of the text: what a neuron adds at a rank, times how often it is there
    power   [E, C]  the same without the router weight g
    tokens  [E]     tokens that were routed to the expert
    """

    energy: Tensor
    ranked: Tensor
    power: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Partition:
    """One MoE layer: E experts, C neurons, N sub-experts of C/N consecutive permuted neurons.

    perm    [E, C]  int32    neuron `perm[e, i]` of the source stands at position i; a bijection per expert
    energy  [E, N]  float32  mean square of the sub-expert's router-weighted saliency, per routed token
    prior   [E, N]  float32  expected norm of the sub-expert's output, without the router weight
    """

    perm: Tensor
    energy: Tensor
    prior: Tensor

    @classmethod
    def of(cls, perm: Tensor, saliency: Saliency, sub_experts: int) -> "Partition":
        """What a permutation [E, C] means for the saliency that was measured before it."""
        order, grouped = perm.long(), (len(perm), sub_experts, -1)
        return cls(
            perm=perm.to(torch.int32),
            energy=saliency.energy.gather(1, order).view(grouped).sum(-1),
            prior=saliency.power.gather(1, order).view(grouped).sum(-1).sqrt(),
        )


def by_energy(energy: Tensor) -> Tensor:
    """Permutation [E, C] int32 by mean energy [E, C], highest first: every prefix loses least of all of its size.

    The loss of dropping neurons is quadratic in what they add, so the mean square orders them, not the mean. Energies
    add up as if the neurons' outputs were orthogonal. Ties keep the source's order, so equal inputs give equal bytes.
    """
    return energy.argsort(dim=1, descending=True, stable=True).to(torch.int32)


def rank_energy(saliency: Saliency, partition: Partition) -> Tensor:
    """[K, N]: energy of the n-th sub-expert of the expert that the router ranks k-th, summed over experts."""
    ranks, sub_experts = len(saliency.ranked), partition.energy.shape[1]
    order = partition.perm.long().expand(ranks, -1, -1)
    return saliency.ranked.gather(2, order).view(ranks, len(partition.perm), sub_experts, -1).sum((1, 3))


def allocate_prefixes(energy: Tensor, cells: int) -> list[int]:
    """How many sub-experts each of K ranks runs when `cells` of the K x N run in all, losing least energy.

    energy [K, N]. Greedy on the next sub-expert of each rank, which is exact where energy falls along a prefix, as it
    does in a partition by energy. The first rank runs at least one. More cells never take one away: budgets are nested.
    """
    ranks, sub_experts = energy.shape
    counts = [1, *[0] * (ranks - 1)]
    for _ in range(cells - 1):
        open_ranks = [rank for rank in range(ranks) if counts[rank] < sub_experts]
        counts[max(open_ranks, key=lambda rank: float(energy[rank, counts[rank]]))] += 1
    return counts


def invert(perm: Tensor) -> Tensor:
    """[E, C] -> [E, C]: the permutation that undoes `perm`."""
    return perm.long().argsort(dim=1)
