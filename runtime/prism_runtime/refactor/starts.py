"""Where a search may start: five ways to divide one expert's neurons into equal sub-experts.

All take `strength [B, C]`, what a neuron adds to a calibration row: its activation times the norm of its row of the
down projection, or the activation alone for the paper's objective. All return [C] int32, ids 0..N-1 of C/N neurons
each, and break ties by the neuron's index, so equal inputs give equal bytes. N divides C; callers check it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

CLUSTER_ITERATIONS = 15
"""k-means settles in about ten on experts of 128 to 1,536 neurons; a search follows anyway."""

Start = Callable[[Tensor, int, int], Tensor]


def contiguous(strength: Tensor, sub_experts: int, seed: int = 0) -> Tensor:
    """As the checkpoint stores them: no partition at all."""
    neurons = strength.shape[1]
    return torch.arange(neurons, dtype=torch.int32) // (neurons // sub_experts)


def shuffled(strength: Tensor, sub_experts: int, seed: int = 0) -> Tensor:
    """Uniformly at random."""
    order = torch.randperm(strength.shape[1], generator=torch.Generator().manual_seed(seed))
    return _consecutive(order, sub_experts)


def by_energy(strength: Tensor, sub_experts: int, seed: int = 0) -> Tensor:
    """The strongest C/N neurons by mean square, the next C/N, and so on: the best nested static choice."""
    return _consecutive(_by_energy(strength), sub_experts)


def hot_core(strength: Tensor, sub_experts: int, seed: int = 0) -> Tensor:
    """The strongest C/N neurons, and balanced spherical k-means of the magnitudes of the others.

    Neurons choose in order of what they would regret most: the gap between their best two centres. The optimal
    assignment is cubic in C, and a search follows anyway.
    """
    size = strength.shape[1] // sub_experts
    core = _by_energy(strength)[:size]
    part = torch.full((strength.shape[1],), -1, dtype=torch.int32)
    part[core] = 0
    rest = (part < 0).nonzero().flatten()
    points = normalize(strength[:, rest].abs().T, dim=1)
    clusters = sub_experts - 1
    draw = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    centres = points[draw[:clusters]]
    chosen = torch.zeros(len(rest), dtype=torch.int64)
    for _ in range(CLUSTER_ITERATIONS):
        before = chosen
        chosen = _balanced(points @ centres.T, size)
        if torch.equal(chosen, before):
            break
        centres = normalize(torch.stack([points[chosen == cluster].mean(0) for cluster in range(clusters)]), dim=1)
    part[rest] = (chosen + 1).to(torch.int32)
    return part


def levelled(strength: Tensor, sub_experts: int, seed: int = 0) -> Tensor:
    """The paper's greedy: strongest first by sum of magnitudes, each to the sub-expert with the least so far.

    It levels what a selection lives on; kept because the paper starts from it (arXiv 2510.19366v1, section 4.1).
    """
    size = strength.shape[1] // sub_experts
    total = strength.abs().sum(0, dtype=torch.float64)
    mass, room = [0.0] * sub_experts, [size] * sub_experts
    part = torch.empty(strength.shape[1], dtype=torch.int32)
    for neuron in total.argsort(descending=True, stable=True).tolist():
        group = min((group for group in range(sub_experts) if room[group]), key=lambda group: mass[group])
        part[neuron] = group
        mass[group] += float(total[neuron])
        room[group] -= 1
    return part


STARTS: dict[str, Start] = {
    "contiguous": contiguous,
    "random": shuffled,
    "sorted": by_energy,
    "hot-core": hot_core,
    "greedy": levelled,
}


def _by_energy(strength: Tensor) -> Tensor:
    return strength.square().sum(0).argsort(descending=True, stable=True)


def _consecutive(order: Tensor, sub_experts: int) -> Tensor:
    """[C] neurons in order -> [C] the sub-expert of each."""
    part = torch.empty(len(order), dtype=torch.int32)
    part[order] = torch.arange(len(order), dtype=torch.int32) // (len(order) // sub_experts)
    return part


def _balanced(similarity: Tensor, size: int) -> Tensor:
    """[points, clusters] -> [points]: the nearest cluster that still has room, for `size` points a cluster."""
    best = similarity.topk(min(2, similarity.shape[1]), dim=1).values
    wishes = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    room, chosen = [size] * similarity.shape[1], torch.empty(len(similarity), dtype=torch.int64)
    for point in (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist():
        cluster = next(cluster for cluster in wishes[point] if room[cluster])
        chosen[point] = cluster
        room[cluster] -= 1
    return chosen
