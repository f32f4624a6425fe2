"""The swap-search partition of one MoE layer: rows of every expert, a start, a search, an order of the groups.

The objective is the loss of a thresholded selection: a sub-expert that runs costs its limit, one that does not costs
the energy it would have added, so sum over rows and sub-experts of min(energy, limit), averaged over the limits of a
few budgets. Energy is o' F o, for the sub-expert's output o times the row's factor, in the metric F of the layer.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism_runtime.refactor.starts import STARTS
from prism_runtime.refactor.swap import swap_search

PROPOSALS_PER_NEURON = 320
"""Of what annealing gains with six times the work, 320 leave 4 %, 640 leave 3 % and 80 leave 10 %.

Measured on the embedded model: experts of 128 neurons, sub-experts of 16, 1,500 rows.
"""
FEW_ROWS_PER_NEURON = 4
"""A sub-expert of C/N neurons wants four rows a neuron; with fewer, a search would fit the noise of its rows."""
ENERGY_ROWS, ENERGY_EXPERTS = 256, 16
"""Rows an expert, and experts a layer, that `starting_energies` reads at most: quantiles of 65,000 energies a layer."""


class ExpertsOfLayer(Protocol):
    """gate, up, down [E, C, H]; activations(x [R, H], expert) -> [R, C], what enters the down projection."""

    @property
    def gate(self) -> Tensor: ...
    @property
    def up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...
    def activations(self, rows: Tensor, expert: int) -> Tensor: ...


class RowsOfLayer(Protocol):
    """x [T, H] what enters the experts, rms [T] of the residual, expert_ids and router_weights [T, K]."""

    @property
    def x(self) -> Tensor: ...
    @property
    def rms(self) -> Tensor: ...
    @property
    def expert_ids(self) -> Tensor: ...
    @property
    def router_weights(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PartitionSettings:
    """starts: names of `starts.STARTS`; of several, the one whose result is best on rows that no search saw.

    proposals   swaps tried for an expert and a start; None is PROPOSALS_PER_NEURON for each of its neurons
    rows        rows that a search reads of an expert, at most; half as many others judge between several starts
    """

    sub_experts: int
    starts: tuple[str, ...] = ("sorted",)
    proposals: int | None = None
    rows: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.starts) - set(STARTS)
        if unknown or not self.starts:
            raise ValueError(f"starts {self.starts}: choose one or more of {', '.join(STARTS)}")
        if self.sub_experts < 2 or (self.proposals or 0) < 0 or self.rows < 1:
            raise ValueError(f"{self}: two sub-experts, no negative proposals and one row are the least")

    def proposals_of(self, neurons: int) -> int:
        return PROPOSALS_PER_NEURON * neurons if self.proposals is None else self.proposals


@dataclass(frozen=True, slots=True)
class Limits:
    """energy: what a threshold would be at each of a few budgets. weights: of their terms in the objective."""

    energy: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExpertSearch:
    """How one expert went. Objectives are means over rows; `held` is on rows that the search did not see.

    few_rows  the expert had too few rows to search, its neurons stand in order of their weights' norms
    """

    expert: int
    rows: int
    start: str
    start_objective: float
    objective: float
    held: float | None
    few_rows: bool


def energy_limits(energies: Sequence[Tensor], kept: Sequence[float] = (0.75, 0.5, 0.25)) -> Limits:
    """The limits at which these shares of the sub-experts of all layers run; each budget's term weighs the same."""
    every = torch.cat([energy.flatten() for energy in energies]).double().sort().values
    if not len(every) or not float(every[-1]) > 0:
        raise ValueError("no energies above zero: limits need calibration rows that reach the experts")
    limits = [float(every[min(int((1 - share) * len(every)), len(every) - 1)]) for share in kept]
    limits = [limit if limit > 0 else float(every[every > 0][0]) for limit in limits]
    means = [float(every.clamp_max(limit).mean()) for limit in limits]
    return Limits(tuple(limits), tuple(1 / (mean * len(limits)) for mean in means))


def starting_energies(
    experts: ExpertsOfLayer,
    rows: RowsOfLayer,
    metric: Tensor,
    settings: PartitionSettings,
    *,
    layer: int = 0,
    factor: Tensor | None = None,
) -> Tensor:
    """[any]: energies under the first start, on a sample of rows and experts: what `energy_limits` takes of a layer."""
    count = len(experts.gate)
    task = _Task(experts, rows, metric, settings, layer, factor, None, None)
    with expert_threads(None) as pool:
        found = list(pool.map(task.starting_energies, range(0, count, -(-count // ENERGY_EXPERTS))))
    return torch.cat(found)


def partition_layer(
    experts: ExpertsOfLayer,
    rows: RowsOfLayer,
    metric: Tensor,
    settings: PartitionSettings,
    *,
    limits: Limits | None = None,
    layer: int = 0,
    factor: Tensor | None = None,
    means: Tensor | None = None,
    start: Tensor | None = None,
    threads: int | None = None,
    chosen: Sequence[int] | None = None,
    on_expert: Callable[[ExpertSearch], None] | None = None,
) -> Tensor:
    """[E, C] int32: neuron perm[e, i] of the source stands at position i; sub-experts by mean energy, highest first.

    metric   [H, H]  symmetric, of the layer's output
    limits   of `energy_limits` over all layers; None takes this layer's own
    layer    enters the seed, with the expert: the result depends neither on the order of layers nor on threads
    factor   [T]     what a token's output is multiplied by, beside the router weight; None is 1 / rms
    means    [E, C]  in the source's order, taken from the activations: energies are then those left by a compensation
    start    [E, C]  a permutation as this function returns it, to go on from, in place of the settings' starts
    threads  experts searched at a time; None is the number of processors this process may use. Each holds its expert's
             rows twice (4 C bytes a row) and a [C, C] Gram matrix
    chosen   experts to search, one row of the result each; None is all. The others' rows may be missing
    on_expert  called in this thread, in order of experts

    Raises ValueError if the sub-experts do not divide C.
    """
    count, neurons = experts.gate.shape[:2]
    searched = range(count) if chosen is None else chosen
    if neurons % settings.sub_experts:
        raise ValueError(f"{neurons} neurons cannot form {settings.sub_experts} equal sub-experts: choose a divisor")
    if limits is None:
        sample = starting_energies(experts, rows, metric, settings, layer=layer, factor=factor)
        limits = energy_limits([sample]) if len(sample) else Limits((1.0,), (1.0,))
    task = _Task(experts, rows, metric, settings, layer, factor, means, start)
    perm = torch.empty(len(searched), neurons, dtype=torch.int32)
    with expert_threads(threads) as pool:
        for row, (order, result) in enumerate(pool.map(lambda expert: task.search(expert, limits), searched)):
            perm[row] = order
            if on_expert is not None:
                on_expert(result)
    return perm


@contextmanager
def expert_threads(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool for the experts of a layer, with one thread inside torch: how it splits a product changes the last bits.

    None is as many as there are processors that this process may use. An exception cancels what has not begun.
    """
    inside = torch.get_num_threads()
    workers = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            torch.set_num_threads(1)
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(inside)


@dataclass(frozen=True, slots=True)
class _Task:
    experts: ExpertsOfLayer
    rows: RowsOfLayer
    metric: Tensor
    settings: PartitionSettings
    layer: int
    factor: Tensor | None
    means: Tensor | None
    start: Tensor | None

    def gram(self, expert: int) -> Tensor:
        """[C, C]: inner products of the neurons' rows of the down projection, in the metric."""
        down = self.experts.down[expert].float()
        gram = down @ self.metric @ down.T
        return (gram + gram.T) / 2

    @property
    def only_start(self) -> bool:
        return self.start is not None or len(self.settings.starts) == 1

    def contributions(self, expert: int, most: int, skip: int = 0) -> tuple[Tensor, Tensor]:
        """[R, C] twice: scaled activations less the means, and without taking them.

        Rows are drawn without repetition: `skip` leaves out the first of the same draw.
        """
        tokens, ranks = (self.rows.expert_ids == expert).nonzero(as_tuple=True)
        seed = (self.settings.seed * 1_000_003 + self.layer) * 1_000_003 + expert
        draw = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[skip : skip + most]
        chosen, ranks = tokens[draw], ranks[draw]
        factor = 1 / self.rows.rms[chosen] if self.factor is None else self.factor[chosen]
        scale = (self.rows.router_weights[chosen, ranks] * factor).float()[:, None]
        activations = self.experts.activations(self.rows.x[chosen], expert).float()
        if self.means is None:
            whole = activations * scale
            return whole, whole
        return (activations - self.means[expert]) * scale, activations * scale

    def starting_energies(self, expert: int) -> Tensor:
        contributions = self.contributions(expert, ENERGY_ROWS)[0]
        if not len(contributions):
            return contributions.flatten()
        gram, groups = self.gram(expert), self.settings.sub_experts
        part = STARTS[self.settings.starts[0]](contributions * gram.diagonal().clamp_min(0).sqrt(), groups, 0)
        return _energies(contributions, gram, part, groups).flatten()

    def search(self, expert: int, limits: Limits) -> tuple[Tensor, ExpertSearch]:
        settings, groups = self.settings, self.settings.sub_experts
        available = int((self.rows.expert_ids == expert).sum())
        rows = settings.rows if self.only_start else min(settings.rows, available * 2 // 3)
        if available * groups < FEW_ROWS_PER_NEURON * self.experts.down.shape[1]:
            order = self.weight_order(expert)
            return order, ExpertSearch(expert, available, "weights", 0.0, 0.0, None, True)
        contributions, whole = self.contributions(expert, rows)
        gram = self.gram(expert)
        weights = [weight / len(contributions) for weight in limits.weights]
        seed, proposals = (settings.seed, self.layer, expert), settings.proposals_of(len(gram))
        candidates = [
            (name, swap_search(contributions, gram, part, limits.energy, weights, proposals, seed))
            for name, part in self.starts(expert, contributions, gram)
        ]
        held: list[float | None] = [None]
        if len(candidates) > 1:
            judges = self.contributions(expert, rows // 2, skip=rows)[0]
            held = [_objective(judges, gram, torch.from_numpy(found.part), groups, limits) for _, found in candidates]
        best = min(range(len(candidates)), key=lambda index: held[index] or 0.0)
        name, found = candidates[best]
        order = order_groups(torch.from_numpy(found.part), whole, gram, groups)
        return order, ExpertSearch(
            expert, available, name, found.start_objective, found.objective, held[best], few_rows=False
        )

    def starts(self, expert: int, contributions: Tensor, gram: Tensor) -> list[tuple[str, Tensor]]:
        groups = self.settings.sub_experts
        if self.start is not None:
            order, part = self.start[expert].long(), torch.empty(gram.shape[0], dtype=torch.int32)
            part[order] = torch.arange(len(order), dtype=torch.int32) // (len(order) // groups)
            return [("given", part)]
        strength = contributions * gram.diagonal().clamp_min(0).sqrt()
        return [(name, STARTS[name](strength, groups, self.settings.seed)) for name in self.settings.starts]

    def weight_order(self, expert: int) -> Tensor:
        """[C] int32: neurons by the product of their three weight vectors' norms, largest first."""
        layer = self.experts
        norms = [weight[expert].float().norm(dim=1) for weight in (layer.gate, layer.up, layer.down)]
        return (norms[0] * norms[1] * norms[2]).argsort(descending=True, stable=True).to(torch.int32)


def order_groups(part: Tensor, contributions: Tensor, gram: Tensor, sub_experts: int) -> Tensor:
    """[C] int32: groups by mean energy, so that the first ones are the best fixed choice; inside by neuron energy."""
    own = contributions.square().sum(0) * gram.diagonal()
    energies = _energies(contributions, gram, part, sub_experts).sum(0)
    groups = energies.argsort(descending=True, stable=True).tolist()
    members = [(part == group).nonzero().flatten() for group in groups]
    return torch.cat([group[own[group].argsort(descending=True, stable=True)] for group in members]).to(torch.int32)


def _energies(contributions: Tensor, gram: Tensor, part: Tensor, sub_experts: int) -> Tensor:
    """[R, N]"""
    columns = []
    for group in range(sub_experts):
        members = (part == group).nonzero().flatten()
        mine = contributions[:, members]
        columns.append(((mine @ gram[members][:, members]) * mine).sum(1).clamp_min(0))
    return torch.stack(columns, 1)


def _objective(contributions: Tensor, gram: Tensor, part: Tensor, sub_experts: int, limits: Limits) -> float:
    energies = _energies(contributions, gram, part, sub_experts)
    terms = zip(limits.energy, limits.weights, strict=True)
    return sum(weight * float(energies.clamp_max(limit).sum(1).mean()) for limit, weight in terms)
