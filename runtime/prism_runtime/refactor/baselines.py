"""What every recipe is compared with, each at equal activated neurons: whole experts, chance, static choices, oracles.

None needs training. Oracles read the true outputs before they choose, at no cost: they bound what any gate can reach on
a partition. Static choices know calibration averages only; their cost is a table look-up.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import count
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from prism_runtime.refactor.method import Choice, Method, Slots
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches


class MaskedForward(Protocol):
    """A model that runs what a method keeps; None runs everything."""

    def log_probabilities(self, batch: Sequence[TokenSequence], method: Method | None) -> Tensor: ...


class TopK:
    """The router's first `kept` experts whole, the rest not at all.

    renormalised  the survivors' weights are scaled to the sum of all K, as a model that normalises its top-k would do
                  if it were run with a smaller k; otherwise they stay as the router scaled them
    """

    def __init__(self, kept: int, renormalised: bool = False) -> None:
        self.name = f"top-{kept}" + (" renormalised" if renormalised else "")
        self._kept = kept
        self._renormalised = renormalised

    def choose(self, slots: Slots) -> Choice:
        chosen = router_rank(slots) < self._kept
        weights = slots.router_weights
        if self._renormalised:
            survivors = (weights * chosen).sum(-1, keepdim=True)
            weights = weights * weights.sum(-1, keepdim=True) / survivors
        return _free(slots, chosen[..., None].expand_as(slots.activations), weights)


class RandomSubExperts:
    """`kept` of a token's K N sub-experts, drawn anew for every token and layer; neurons grouped as they lie."""

    def __init__(self, kept: int, sub_experts: int, seed: int = 0) -> None:
        self.name = f"random {kept}"
        self._kept = kept
        self._sub_experts = sub_experts
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, slots: Slots) -> Choice:
        tokens, top_k, neurons = slots.activations.shape
        draw = torch.rand(tokens, top_k * self._sub_experts, generator=self._generator)
        drawn = draw.argsort(-1).argsort(-1) < self._kept
        keep = drawn.view(tokens, top_k, -1).repeat_interleave(neurons // self._sub_experts, -1)
        return _free(slots, keep)


class Prefix:
    """The first sub-experts of every routed expert, as many as `counts` [L, K] says for the layer and router rank.

    With one number for all ranks it is the uniform prefix: on an unpermuted model the contiguous partition, on one
    sorted by energy the sorted static one.
    """

    def __init__(self, name: str, counts: Tensor, sub_experts: int) -> None:
        self.name = name
        self._counts = counts
        self._sub_experts = sub_experts

    def choose(self, slots: Slots) -> Choice:
        neurons = slots.activations.shape[-1]
        kept = self._counts[slots.layer][router_rank(slots)] * (neurons // self._sub_experts)
        return _free(slots, torch.arange(neurons) < kept[..., None])


class StaticMask:
    """Neurons pruned once for all tokens. masks: for each layer bool [E, C]."""

    def __init__(self, name: str, masks: Sequence[Tensor]) -> None:
        self.name = name
        self._masks = masks

    def choose(self, slots: Slots) -> Choice:
        return _free(slots, self._masks[slots.layer][slots.expert_ids])


class ThresholdGate(ABC):
    """Keeps a sub-expert iff its log score reaches its layer's threshold: a variable number for each token.

    groups   for each layer int64 [E, C]: the sub-expert of each neuron, groups of one size
    log_tau  [L]; `calibrate_threshold` sets it
    observe  is shown (layer, log scores [T, K, N]) at every choice
    """

    def __init__(self, name: str, groups: Sequence[Tensor], sub_experts: int) -> None:
        self.name = name
        self.groups = groups
        self.sub_experts = sub_experts
        self.log_tau = torch.full((len(groups),), -torch.inf)
        self.observe: Callable[[int, Tensor], None] = lambda layer, scores: None

    @abstractmethod
    def log_scores(self, slots: Slots) -> Tensor:
        """[T, K, N], log of the router-weighted norm expected of a sub-expert's output over the residual's size."""

    def choose(self, slots: Slots) -> Choice:
        scores = self.log_scores(slots)
        self.observe(slots.layer, scores)
        return self.keep(slots, scores >= self.log_tau[slots.layer])

    def keep(self, slots: Slots, sub_experts: Tensor) -> Choice:
        """The choice of `sub_experts`, bool [T, K, N]."""
        return _free(slots, sub_experts.gather(-1, self.groups[slots.layer][slots.expert_ids]))


class OracleGate(ThresholdGate):
    """Chooses by the true output norms ||o_tn|| in a metric; with one neuron a sub-expert it is the neuron oracle.

    An instance serves one model with its neurons in one order: it keeps what it needs of the weights.

    metric      for each layer [H, H], or None for the Euclidean norm
    log_factor  (x [T, H], rms [T]) -> [T], a token's weight; 1 / rms unless given
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[Tensor],
        sub_experts: int,
        metric: Sequence[Tensor] | None = None,
        log_factor: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(name, groups, sub_experts)
        self._metric = metric
        self._log_factor = log_factor or (lambda x, rms: -rms.log())
        self._grams: dict[int, Tensor] = {}

    def log_scores(self, slots: Slots) -> Tensor:
        energy = self._energies(slots).clamp_min(torch.finfo(torch.float32).tiny)
        token = slots.router_weights.log() + self._log_factor(slots.x, slots.rms)[:, None]
        return 0.5 * energy.log() + token[..., None]

    def _energies(self, slots: Slots) -> Tensor:
        """||o_tn||^2 [T, K, N], cross terms of a sub-expert's neurons included."""
        order = self.groups[slots.layer].argsort(dim=-1, stable=True)
        if slots.layer not in self._grams:  # the weights of a layer do not change between its batches
            self._grams[slots.layer] = self._gram(slots, order)
        energies = slots.activations.new_zeros(*slots.expert_ids.shape, self.sub_experts)
        for expert in slots.expert_ids.unique().tolist():
            rows = slots.expert_ids == expert
            grouped = slots.activations[rows][:, order[expert]].unflatten(-1, (self.sub_experts, -1))
            weighted = torch.einsum("rnd,nde->rne", grouped, self._grams[slots.layer][expert])
            energies[rows] = (weighted * grouped).sum(-1)
        return energies

    def _gram(self, slots: Slots, order: Tensor) -> Tensor:
        """[E, N, d, d]: inner products of a sub-expert's down rows in the metric."""
        experts = torch.arange(len(order))[:, None]
        rows = slots.down[experts, order].unflatten(1, (self.sub_experts, -1))
        measured = rows if self._metric is None else rows @ self._metric[slots.layer]
        return measured @ rows.transpose(-1, -2)


class PriorGate(ThresholdGate):
    """Knows each sub-expert's mean energy on calibration text and the router weight, nothing of the token.

    energies  for each layer [E, C], as `NeuronEnergies` collects them
    """

    def __init__(self, name: str, groups: Sequence[Tensor], sub_experts: int, energies: Sequence[Tensor]) -> None:
        super().__init__(name, groups, sub_experts)
        self._log_norms = [
            0.5 * torch.zeros(len(cut), sub_experts).scatter_add(1, cut, energy).clamp_min(1e-30).log()
            for cut, energy in zip(groups, energies, strict=True)
        ]

    def log_scores(self, slots: Slots) -> Tensor:
        token = slots.router_weights.log() - slots.rms.log()[:, None]
        return self._log_norms[slots.layer][slots.expert_ids] + token[..., None]


class NeuronEnergies:
    """Keeps everything and collects each neuron's mean squared output over the residual's size, router-weighted."""

    name = "full"

    def __init__(self, metric: Sequence[Tensor] | None = None) -> None:
        self._metric = metric
        self._sums: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}

    def choose(self, slots: Slots) -> Choice:
        experts, neurons, _ = slots.down.shape
        rows = slots.down if self._metric is None else slots.down @ self._metric[slots.layer]
        ids, weight = slots.expert_ids.flatten(), slots.router_weights.flatten() ** 2
        scaled = (slots.activations / slots.rms[:, None, None]).flatten(0, 1) ** 2 * weight[:, None]
        sums = self._sums.setdefault(slots.layer, torch.zeros(experts, neurons))
        sums.index_add_(0, ids, scaled * (rows * slots.down).sum(-1)[ids])
        self._weights.setdefault(slots.layer, torch.zeros(experts)).index_add_(0, ids, weight)
        return _free(slots, torch.ones_like(slots.activations, dtype=torch.bool))

    def of_layers(self) -> list[Tensor]:
        """For each layer [E, C]; zeros for an expert that no token was routed to."""
        return [self._sums[layer] / self._weights[layer].clamp_min(1e-30)[:, None] for layer in range(len(self._sums))]


def contiguous_groups(shape: tuple[int, int], layers: int, sub_experts: int) -> list[Tensor]:
    """Sub-experts cut from the neurons as they lie. shape: (E, C)."""
    return [(torch.arange(shape[1]) // (shape[1] // sub_experts)).expand(shape) for _ in range(layers)]


def sorted_groups(energies: Sequence[Tensor], sub_experts: int) -> list[Tensor]:
    """Sub-experts cut from each expert's neurons in falling energy; sub-expert 0 is the strongest."""
    size = energies[0].shape[1] // sub_experts
    return [energy.argsort(dim=-1, descending=True, stable=True).argsort(-1) // size for energy in energies]


def random_groups(shape: tuple[int, int], layers: int, sub_experts: int, seed: int = 0) -> list[Tensor]:
    """Sub-experts of neurons drawn without replacement. shape: (E, C)."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[1] // sub_experts
    return [torch.rand(shape, generator=generator).argsort(-1).argsort(-1) // size for _ in range(layers)]


def strongest_neurons(energies: Sequence[Tensor], share: float) -> list[Tensor]:
    """For each layer bool [E, C]: the `share` of every expert's neurons that has the most energy."""
    kept = round(share * energies[0].shape[1])
    return [energy.argsort(dim=-1, descending=True, stable=True).argsort(-1) < kept for energy in energies]


def calibrate_threshold(
    model: MaskedForward,
    gate: ThresholdGate,
    sequences: Sequence[TokenSequence],
    budget: float,
    *,
    per_layer: bool = False,
    rounds: int = 3,
) -> None:
    """Set `gate.log_tau` so that the share `budget` of the sub-experts runs on `sequences`.

    The first round sees the full model's scores; each later one those of the trajectory that the last threshold gives,
    since what earlier layers drop shifts the scores of later ones. One threshold for all layers unless `per_layer`.
    """
    layers = len(gate.log_tau)
    gate.log_tau = torch.full((layers,), -torch.inf)
    # A sample is enough for a quantile; a stride that shares no factor with N sees every sub-expert.
    stride = next(each for each in count(max(1, gate.sub_experts // 16)) if gcd(each, gate.sub_experts) == 1)
    for _ in range(rounds):
        seen: list[list[Tensor]] = [[] for _ in range(layers)]
        gate.observe = lambda layer, scores, seen=seen: seen[layer].append(scores.flatten()[::stride])  # type: ignore[misc]
        for batch in batches(sequences):
            model.log_probabilities(batch, gate)
        scores = [torch.cat(parts) for parts in seen]
        pools = scores if per_layer else [torch.cat(scores)] * layers
        gate.log_tau = torch.stack([_quantile(pool, 1 - budget) for pool in pools])
    gate.observe = lambda layer, scores: None


def router_rank(slots: Slots) -> Tensor:
    """[T, K]: 0 for the expert with the largest router weight; models do not all list them in order."""
    return slots.router_weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Smallest value that `share` of `values` lie below; torch.quantile takes 16 million values at most."""
    return values.kthvalue(min(values.numel(), int(share * values.numel()) + 1)).values


def _free(slots: Slots, keep: Tensor, router_weights: Tensor | None = None) -> Choice:
    """A choice that costs its neurons and nothing else."""
    return Choice(
        keep=keep,
        router_weights=slots.router_weights if router_weights is None else router_weights,
        added=None,
        extra=torch.zeros(len(slots.x)),
    )
