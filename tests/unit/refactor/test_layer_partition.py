"""Partition of a layer: equal groups in order of energy, the same bytes for any number of threads, held-out choice."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from prism_runtime.refactor.layer_search import (
    ExpertSearch,
    Limits,
    PartitionSettings,
    energy_limits,
    partition_layer,
    starting_energies,
)
from prism_runtime.refactor.starts import STARTS

EXPERTS, NEURONS, HIDDEN, TOKENS, ROUTED, SUB_EXPERTS = 5, 32, 16, 900, 2, 4
RARE = EXPERTS - 1
SETTINGS = PartitionSettings(SUB_EXPERTS, proposals=1_500, rows=200)
METRIC = torch.eye(HIDDEN)


@dataclass(frozen=True)
class Layer:
    """Experts and their rows in one. The last expert is routed three times in all."""

    gate: Tensor
    up: Tensor
    down: Tensor
    x: Tensor
    rms: Tensor
    expert_ids: Tensor
    router_weights: Tensor

    def activations(self, rows: Tensor, expert: int) -> Tensor:
        return silu(rows @ self.gate[expert].T) * (rows @ self.up[expert].T)


@cache
def layer() -> Layer:
    random = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(EXPERTS, NEURONS, HIDDEN, generator=random) for _ in range(3))
    ids = torch.rand(TOKENS, RARE, generator=random).argsort(1)[:, :ROUTED]
    ids[:3, 0] = RARE
    weights = torch.rand(TOKENS, ROUTED, generator=random)
    x, rms = torch.randn(TOKENS, HIDDEN, generator=random), 0.5 + torch.rand(TOKENS, generator=random)
    return Layer(gate, up, down, x, rms, ids, weights)


def partition(settings: PartitionSettings = SETTINGS, metric: Tensor = METRIC, **options: object) -> Tensor:
    return partition_layer(layer(), layer(), metric, settings, **options)  # type: ignore[arg-type]


def energies(perm: Tensor, expert: int) -> Tensor:
    """[R, N]: true energies of the sub-experts, over all rows of the expert."""
    found = layer()
    tokens, ranks = (found.expert_ids == expert).nonzero(as_tuple=True)
    scale = found.router_weights[tokens, ranks] / found.rms[tokens]
    order = perm[expert].long()
    activations = (found.activations(found.x[tokens], expert) * scale[:, None])[:, order]
    outputs = torch.einsum(
        "rnd,ndh->rnh",
        activations.view(len(tokens), SUB_EXPERTS, -1),
        found.down[expert][order].view(SUB_EXPERTS, -1, HIDDEN),
    )
    return outputs.square().sum(-1)


def loss(perm: Tensor, expert: int, limits: Limits) -> float:
    found = energies(perm, expert)
    terms = zip(limits.energy, limits.weights, strict=True)
    return sum(weight * float(found.clamp_max(limit).sum(1).mean()) for limit, weight in terms)


def test_every_expert_gets_a_permutation_of_its_neurons() -> None:
    perm = partition()
    assert perm.dtype == torch.int32
    assert torch.equal(perm.sort(1).values, torch.arange(NEURONS, dtype=torch.int32).expand(EXPERTS, -1))


def test_one_thread_and_several_give_the_same_bytes() -> None:
    settings = replace(SETTINGS, starts=tuple(STARTS))
    assert torch.equal(partition(settings, threads=1), partition(settings, threads=4))


def test_the_search_lowers_the_loss_of_a_threshold_below_every_start() -> None:
    limits = energy_limits([starting_energies(layer(), layer(), METRIC, SETTINGS)])
    found = partition(limits=limits)
    for name in STARTS:
        start = partition(replace(SETTINGS, starts=(name,), proposals=0), limits=limits)
        assert sum(loss(found, expert, limits) for expert in range(RARE)) < sum(
            loss(start, expert, limits) for expert in range(RARE)
        )


def test_reported_objectives_fall_and_are_those_of_the_rows_searched() -> None:
    limits = energy_limits([starting_energies(layer(), layer(), METRIC, SETTINGS)])
    searches: list[ExpertSearch] = []
    perm = partition(replace(SETTINGS, rows=TOKENS), limits=limits, on_expert=searches.append)
    assert [search.expert for search in searches] == list(range(EXPERTS))
    for search in searches[:RARE]:
        assert search.objective < search.start_objective
        assert search.objective == pytest.approx(loss(perm, search.expert, limits), rel=1e-3)


def test_sub_experts_stand_in_order_of_mean_energy() -> None:
    perm = partition(replace(SETTINGS, rows=TOKENS))
    for expert in range(RARE):
        means = energies(perm, expert).mean(0)
        assert torch.equal(means, means.sort(descending=True).values)


def test_an_expert_with_too_few_rows_is_ordered_by_its_weights_and_marked() -> None:
    searches: list[ExpertSearch] = []
    perm = partition(on_expert=searches.append)
    assert [search.few_rows for search in searches] == [False] * RARE + [True]
    weights = layer().gate[RARE].norm(dim=1) * layer().up[RARE].norm(dim=1) * layer().down[RARE].norm(dim=1)
    assert perm[RARE].tolist() == weights.argsort(descending=True, stable=True).tolist()


def test_an_expert_without_rows_has_no_energies_and_is_ordered_by_its_weights() -> None:
    without = replace(layer(), expert_ids=layer().expert_ids.clamp_max(RARE - 1))
    settings = replace(SETTINGS, starts=("hot-core", "sorted"))
    whole = starting_energies(layer(), layer(), METRIC, settings)
    assert len(whole) - len(starting_energies(without, without, METRIC, settings)) == 3 * SUB_EXPERTS
    perm = partition_layer(without, without, METRIC, settings)
    assert torch.equal(perm[RARE], partition(settings)[RARE])


def test_of_several_starts_the_best_on_rows_nobody_searched_is_taken() -> None:
    held: list[list[float]] = []
    for starts in (("contiguous", "random"), ("contiguous", "random", "sorted"), tuple(STARTS)):
        searches: list[ExpertSearch] = []
        partition(replace(SETTINGS, starts=starts, proposals=100), on_expert=searches.append)
        held.append([search.held for search in searches if search.held is not None])
        assert {search.start for search in searches} <= {*starts, "weights"}
    assert all(len(column) == RARE for column in held)
    for two, three, five in zip(*held, strict=True):
        assert two >= three >= five
    assert sum(held[0]) > sum(held[2])


def test_rows_that_judge_are_those_that_were_not_searched() -> None:
    """Asked for more rows than there are, two thirds are searched and one judges: together they are all rows."""
    limits = energy_limits([starting_energies(layer(), layer(), METRIC, SETTINGS)])
    searches: list[ExpertSearch] = []
    settings = replace(SETTINGS, starts=("contiguous", "random"), rows=TOKENS)
    perm = partition(settings, limits=limits, on_expert=searches.append)
    for search in searches[:RARE]:
        assert search.held is not None
        whole = (2 * search.objective + search.held) / 3
        assert whole == pytest.approx(loss(perm, search.expert, limits), rel=4e-3)


def test_a_second_pass_goes_on_from_the_first_with_means_taken_out() -> None:
    first = partition(replace(SETTINGS, proposals=50))
    means = torch.rand(EXPERTS, NEURONS, generator=torch.Generator().manual_seed(1))
    idle = partition(replace(SETTINGS, proposals=0), start=first, means=means)
    groups = [[set(group.tolist()) for group in perm.view(SUB_EXPERTS, -1)] for perm in (first[0], idle[0])]
    assert sorted(map(sorted, groups[0])) == sorted(map(sorted, groups[1]))
    centred, plain = partition(start=first, means=means), partition(start=first)
    assert not torch.equal(centred, plain)


def test_the_metric_and_the_factor_of_tokens_count() -> None:
    stretched = torch.diag(torch.arange(1.0, HIDDEN + 1) ** 3)
    assert not torch.equal(partition(), partition(metric=stretched))
    assert torch.equal(partition(), partition(factor=1 / layer().rms))
    assert not torch.equal(partition(), partition(factor=layer().x[:, 0].abs()))


def test_limits_are_the_energies_at_which_a_share_of_sub_experts_runs() -> None:
    limits = energy_limits([torch.arange(1.0, 51), torch.arange(51.0, 101)], kept=(0.75, 0.5))
    assert limits.energy == (26.0, 51.0)
    every = torch.arange(1.0, 101)
    assert limits.weights[1] == pytest.approx(1 / (2 * float(every.clamp_max(51).mean())))


def test_sub_experts_that_do_not_divide_and_unknown_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="32 neurons cannot form 5 equal sub-experts"):
        partition(replace(SETTINGS, sub_experts=5))
    with pytest.raises(ValueError, match="choose one or more of contiguous"):
        PartitionSettings(4, starts=("metis",))
    with pytest.raises(ValueError, match="limits need calibration rows"):
        energy_limits([torch.zeros(4)])


@pytest.mark.parametrize("name", STARTS)
def test_a_start_has_groups_of_one_size_and_depends_on_the_seed_alone(name: str) -> None:
    strength = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    part = STARTS[name](strength, 4, 3)
    assert part.dtype == torch.int32
    assert part.bincount().tolist() == [6, 6, 6, 6]
    assert torch.equal(part, STARTS[name](strength, 4, 3))


def test_hot_core_holds_the_strongest_and_clusters_those_that_fire_together() -> None:
    random = torch.Generator().manual_seed(3)
    fires = (torch.rand(400, 3, generator=random) < 0.3).float().repeat_interleave(5, 1)
    strength = torch.cat([torch.full((400, 5), 9.0), fires * (1 + torch.rand(400, 15, generator=random))], 1)
    part = STARTS["hot-core"](strength, 4, 0)
    assert part[:5].tolist() == [0] * 5
    assert [len(set(part[team : team + 5].tolist())) for team in (5, 10, 15)] == [1, 1, 1]


def test_the_greedy_start_levels_the_sums_of_magnitudes() -> None:
    strength = torch.arange(1.0, 25)[None].expand(3, -1)
    masses = torch.zeros(4).index_add(0, STARTS["greedy"](strength, 4, 0).long(), strength[0])
    assert float(masses.max() - masses.min()) <= 4


def test_the_partition_of_chosen_experts_is_theirs_in_the_partition_of_all() -> None:
    """So that the tasks of a layer can be divided over processes."""
    found, limits = layer(), Limits((0.1, 1.0), (1.0, 1.0))
    whole = partition_layer(found, found, METRIC, SETTINGS, limits=limits, layer=1, threads=2)
    chosen = partition_layer(found, found, METRIC, SETTINGS, limits=limits, layer=1, threads=1, chosen=[3, 1])
    assert torch.equal(chosen, whole[[3, 1]])
