"""Policy `paper`: the training-free method of MoE-Prism, arXiv 2510.19366v1, sections 4.1 to 4.3, as a baseline.

Partition: sums of magnitudes of the activations; the sum over tokens of the smallest N - 1 of N sums is minimised, from
a greedy start, by annealing at the published temperatures. Gate: a few neurons a sub-expert, those that are active
together with most others, computed exactly; their mean magnitude is the score. Selection: whole experts for the first
ranks, all but one sub-expert of the next, one of the one after; router weights stay as they are.

The published temperatures are in units of the objective and below its steps after some 1,000 of 100,000 proposals. So
that the method is not judged by its schedule, `thawed` takes its temperatures from the data and cools to the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prism_runtime.refactor.layer_search import ExpertsOfLayer, RowsOfLayer, expert_threads
from prism_runtime.refactor.method import Choice, Slots
from prism_runtime.refactor.starts import contiguous, levelled
from prism_runtime.refactor.swap import Seed, geometric, mass_deltas, mass_search

PUBLISHED_START, PUBLISHED_FACTOR = 100.0, 0.995
HOT_ACCEPTANCE, THAWED_RATIO, PROBES = 0.25, 1e-3, 200
"""The median of 200 random swaps is taken at first with probability .25; at the end the temperature is a thousandth.

A twentieth would still walk at random: the objective must stop rising well before the last proposal.
"""

Schedule = Literal["published", "thawed"]
Coactivation = Literal["expert", "sub-expert"]


@dataclass(frozen=True, slots=True)
class PaperSettings:
    """schedule      of the temperature: see the module
    coactivation  where a token's most active `active_share` of neurons are counted: in the whole expert, as the paper's
                  text has it, or in each sub-expert
    rows          calibration rows of an expert, at most; None takes all, as the paper does
    """

    sub_experts: int = 4
    schedule: Schedule = "published"
    coactivation: Coactivation = "expert"
    gate_neurons: int = 4
    active_share: float = 0.75
    proposals: int = 100_000
    rows: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PaperLayer:
    """perm [E, C] int32: neuron perm[e, i] stands at position i. gate_neurons [E, N, r] int64: positions after it."""

    perm: Tensor
    gate_neurons: Tensor


def fit_paper(
    experts: ExpertsOfLayer,
    rows: RowsOfLayer,
    settings: PaperSettings,
    *,
    layer: int = 0,
    threads: int | None = None,
    on_expert: Callable[[int, float, float], None] | None = None,
) -> PaperLayer:
    """One layer's partition and gate neurons. `on_expert` is told expert, objective of the start, objective.

    The result depends neither on the order of layers nor on threads. An expert without rows stays as it is stored.
    Raises ValueError if sub-experts or gate neurons do not fit C.
    """
    count, neurons = experts.down.shape[:2]
    size = neurons // settings.sub_experts
    if settings.sub_experts < 2 or neurons % settings.sub_experts or not 0 < settings.gate_neurons <= size:
        raise ValueError(
            f"{neurons} neurons, {settings.sub_experts} sub-experts, {settings.gate_neurons} gate neurons: sub-experts "
            f"must be two or more and divide the neurons, and hold their gate neurons"
        )

    def fit(expert: int) -> tuple[Tensor, Tensor, float, float]:
        magnitudes = _magnitudes(experts, rows, expert, settings, layer)
        if not len(magnitudes):
            part, objectives = contiguous(magnitudes, settings.sub_experts), (0.0, 0.0)
        else:
            part, objectives = _partition(magnitudes, settings, (settings.seed, layer, expert))
        mass = torch.stack([magnitudes[:, part == group].sum() for group in range(settings.sub_experts)])
        groups = mass.argsort(descending=True, stable=True).tolist()
        order = torch.cat([(part == group).nonzero().flatten() for group in groups])
        return order.to(torch.int32), gate_neurons(magnitudes[:, order], settings), *objectives

    perm = torch.empty(count, neurons, dtype=torch.int32)
    gates = torch.empty(count, settings.sub_experts, settings.gate_neurons, dtype=torch.int64)
    with expert_threads(threads) as pool:
        for expert, (order, chosen, before, after) in enumerate(pool.map(fit, range(count))):
            perm[expert], gates[expert] = order, chosen
            if on_expert is not None:
                on_expert(expert, before, after)
    return PaperLayer(perm, gates)


def gate_neurons(magnitudes: Tensor, settings: PaperSettings) -> Tensor:
    """[N, r] int64: positions of each sub-expert's most central neurons, most central first.

    magnitudes [R, C], neurons in the order of the partition. A neuron is active for a row if it is among the largest
    `active_share`; two are co-active as often as both are; centrality is the sum over the neuron's sub-expert.
    """
    (rows, neurons), groups = magnitudes.shape, settings.sub_experts
    scopes = 1 if settings.coactivation == "expert" else groups
    scope = magnitudes.view(rows, scopes, neurons // scopes)
    active = torch.zeros_like(scope, dtype=torch.float32)
    largest = scope.topk(max(1, round(settings.active_share * scope.shape[-1])), dim=-1).indices
    active.scatter_(-1, largest, 1.0)
    grouped = active.view(rows, groups, neurons // groups)
    # Row sums of Z'Z without the matrix: a neuron's rows, weighted by how many of its sub-expert are active there.
    centrality = torch.einsum("rnd,rn->nd", grouped, grouped.sum(-1))
    central = centrality.argsort(dim=1, descending=True, stable=True)[:, : settings.gate_neurons]
    return central + torch.arange(groups)[:, None] * (neurons // groups)


def rank_pattern(active: int, ranks: int, sub_experts: int) -> list[int]:
    """Sub-experts that run of the experts the router ranks first, second, ...: `active` in all.

    As published where `active` is k N for k < K ranks: k - 1 whole experts, N - 1 sub-experts and one. What the paper
    does not define is ours: whole experts and the rest of the next one.
    """
    if not 0 < active <= ranks * sub_experts:
        raise ValueError(f"{active} active sub-experts: between 1 and {ranks * sub_experts} can be")
    whole, rest = divmod(active, sub_experts)
    pattern = [sub_experts] * whole + ([rest] if rest else [])
    if not rest and whole < ranks:
        pattern[-1:] = [sub_experts - 1, 1]
    return pattern + [0] * (ranks - len(pattern))


class PaperMethod:
    """`Method` at one number of active sub-experts a token (the paper's k_sub), over the layers' gate neurons.

    Slots' neurons stand in the order of the layers' `perm`. The gate is evaluated only at ranks where it decides. A
    gate neuron costs two of a neuron's three projections, and nothing where its sub-expert runs anyway.
    """

    def __init__(self, layers: Sequence[PaperLayer], active: int, ranks: int) -> None:
        self.layers = list(layers)
        self.pattern = rank_pattern(active, ranks, layers[0].gate_neurons.shape[1])
        self.name = f"paper-{active}"

    def choose(self, slots: Slots) -> Choice:
        gates = self.layers[slots.layer].gate_neurons.to(slots.expert_ids.device)
        sub_experts, per_gate = gates.shape[1:]
        tokens, ranks, neurons = slots.activations.shape
        if ranks != len(self.pattern):
            raise ValueError(f"{ranks} routed experts a token, the method was made for {len(self.pattern)}")
        # Ties keep the router's own order.
        place = slots.router_weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        wanted = torch.tensor(self.pattern, device=place.device)[place]
        positions = gates[slots.expert_ids].flatten(2)
        score = slots.activations.gather(2, positions).abs().view(tokens, ranks, sub_experts, per_gate).mean(-1)
        better = score.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        runs = better < wanted[..., None]
        decides = (wanted > 0) & (wanted < sub_experts)
        unused = (~runs & decides[..., None]).sum((1, 2)) * per_gate
        keep = runs.repeat_interleave(neurons // sub_experts, dim=2)
        return Choice(keep, slots.router_weights, None, unused * (2 / 3))


def _magnitudes(experts: ExpertsOfLayer, rows: RowsOfLayer, expert: int, settings: PaperSettings, layer: int) -> Tensor:
    """[R, C] float64: neither router weight nor down projection enter the paper's objective."""
    tokens = (rows.expert_ids == expert).any(1).nonzero().flatten()
    if settings.rows is not None:
        seed = (settings.seed * 1_000_003 + layer) * 1_000_003 + expert
        draw = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        tokens = tokens[draw[: settings.rows]]
    return experts.activations(rows.x[tokens], expert).abs().double()


def _partition(magnitudes: Tensor, settings: PaperSettings, seed: Seed) -> tuple[Tensor, tuple[float, float]]:
    start = levelled(magnitudes, settings.sub_experts)
    values, off, proposals = magnitudes.numpy(), settings.sub_experts - 1, settings.proposals
    if settings.schedule == "published":
        temperatures = geometric(PUBLISHED_START, PUBLISHED_FACTOR, proposals)
    else:
        probes = mass_deltas(values, start.numpy(), off, PROBES, seed)
        first = float(np.median(np.abs(probes))) / -np.log(HOT_ACCEPTANCE)
        temperatures = geometric(first, THAWED_RATIO ** (1 / max(1, proposals)), proposals)
    found = mass_search(values, start.numpy(), off, proposals, seed, temperatures=temperatures)
    return torch.from_numpy(found.part), (found.start_objective, found.objective)
