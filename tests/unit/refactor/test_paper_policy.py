"""The paper's training-free method: its objective and schedule, its gate neurons, its rank patterns, what it costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from prism_runtime.refactor.method import Slots
from prism_runtime.refactor.paper import PaperLayer, PaperMethod, PaperSettings, fit_paper, gate_neurons, rank_pattern
from prism_runtime.refactor.starts import levelled
from tests.unit.refactor.test_layer_partition import EXPERTS, HIDDEN, NEURONS, RARE, ROUTED, SUB_EXPERTS, layer

SETTINGS = PaperSettings(SUB_EXPERTS, proposals=4_000, gate_neurons=2)


def dropped_mass(perm: Tensor, expert: int) -> float:
    """The definition: per token, the three smallest of four sums of magnitudes, summed over the expert's tokens."""
    found = layer()
    tokens = (found.expert_ids == expert).any(1)
    magnitudes = found.activations(found.x[tokens], expert).abs().double()[:, perm[expert].long()]
    mass = magnitudes.view(len(magnitudes), SUB_EXPERTS, -1).sum(-1)
    return float(mass.sort(1).values[:, : SUB_EXPERTS - 1].sum())


@pytest.mark.parametrize("schedule", ["published", "thawed"])
def test_the_objective_falls_from_the_greedy_start_and_is_the_mass_of_all_but_the_best(schedule: str) -> None:
    told: dict[int, tuple[float, float]] = {}
    settings = replace(SETTINGS, schedule=schedule)
    perm = fit_paper(
        layer(), layer(), settings, on_expert=lambda expert, before, after: told.update({expert: (before, after)})
    ).perm
    assert torch.equal(perm.sort(1).values, torch.arange(NEURONS, dtype=torch.int32).expand(EXPERTS, -1))
    for expert in range(RARE):
        before, after = told[expert]
        assert after < before
        assert after == pytest.approx(dropped_mass(perm, expert), rel=1e-6)
        tokens = (layer().expert_ids == expert).any(1)
        start = levelled(layer().activations(layer().x[tokens], expert), SUB_EXPERTS)
        assert before == pytest.approx(dropped_mass(start.argsort(stable=True).expand(EXPERTS, -1), expert), rel=1e-6)


def test_one_thread_and_several_give_the_same_bytes() -> None:
    one, four = (fit_paper(layer(), layer(), SETTINGS, threads=threads) for threads in (1, 4))
    assert torch.equal(one.perm, four.perm)
    assert torch.equal(one.gate_neurons, four.gate_neurons)


def test_gate_neurons_are_those_active_together_with_most_of_their_sub_expert() -> None:
    """Centrality by the matrix of the paper, which the code avoids."""
    random = torch.Generator().manual_seed(0)
    magnitudes = torch.rand(60, 16, generator=random) * torch.rand(16, generator=random)
    active = torch.zeros(60, 16)
    active.scatter_(1, magnitudes.topk(12, dim=1).indices, 1.0)
    together = active.T @ active
    wanted = []
    for group in range(4):
        members = range(4 * group, 4 * group + 4)
        centrality = together[members][:, members].sum(1)
        wanted.append((centrality.argsort(descending=True, stable=True)[:2] + 4 * group).tolist())
    assert gate_neurons(magnitudes, SETTINGS).tolist() == wanted


def test_co_activation_can_be_counted_inside_each_sub_expert() -> None:
    """Three of four neurons of every group count, also where the whole group is weak."""
    magnitudes = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.4, 0.3, 0.2]]).repeat(5, 1)
    settings = PaperSettings(2, gate_neurons=1, coactivation="sub-expert")
    assert gate_neurons(magnitudes, settings).tolist() == [[0], [5]]
    # In the whole expert six are active: all of the strong group, and the two strongest of the weak one.
    assert gate_neurons(magnitudes, replace(settings, coactivation="expert")).tolist() == [[0], [5]]
    weakest = replace(settings, gate_neurons=4)
    assert sorted(gate_neurons(magnitudes, weakest)[1].tolist()) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("active", "ranks", "pattern"),
    [
        (16, 8, [4, 4, 4, 3, 1, 0, 0, 0]),
        (16, 6, [4, 4, 4, 3, 1, 0]),
        (8, 6, [4, 3, 1, 0, 0, 0]),
        (24, 8, [4, 4, 4, 4, 4, 3, 1, 0]),
        (32, 8, [4] * 8),
        (18, 8, [4, 4, 4, 4, 2, 0, 0, 0]),
        (1, 2, [1, 0]),
    ],
)
def test_rank_patterns_are_the_published_ones_and_sum_to_the_budget(
    active: int, ranks: int, pattern: list[int]
) -> None:
    assert rank_pattern(active, ranks, 4) == pattern
    assert sum(pattern) == active


def test_more_sub_experts_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 8 can be"):
        rank_pattern(9, 2, 4)


def slots(activations: Tensor, router_weights: list[list[float]]) -> Slots:
    """One expert, eight neurons in four sub-experts of two."""
    tokens, ranks = len(router_weights), len(router_weights[0])
    return Slots(
        layer=0,
        x=torch.zeros(tokens, 1),
        rms=torch.ones(tokens),
        expert_ids=torch.zeros(tokens, ranks, dtype=torch.int64),
        router_weights=torch.tensor(router_weights),
        activations=activations,
        down=torch.zeros(1, 8, 1),
    )


def test_the_rank_comes_from_the_router_weight_and_the_gate_chooses_inside_it() -> None:
    gates = PaperLayer(torch.arange(8, dtype=torch.int32)[None], torch.tensor([[[0], [2], [4], [6]]]))
    activations = torch.zeros(1, 3, 8)
    activations[0, :, ::2] = torch.tensor([[0.1, -0.4, 0.3, 0.2], [9.0, 9.0, 9.0, 9.0], [-5.0, 1.0, 2.0, 3.0]])
    activations[0, :, 1::2] = 100.0
    choice = PaperMethod([gates], 4, 3).choose(slots(activations, [[0.2, 0.1, 0.7]]))
    by_sub_expert = choice.keep.view(1, 3, 4, 2)
    assert torch.equal(by_sub_expert[..., 0], by_sub_expert[..., 1])
    # The third slot ranks first: all but its weakest. The first slot ranks second: its strongest. The other: nothing.
    assert by_sub_expert[0, :, :, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]
    assert torch.equal(choice.router_weights, torch.tensor([[0.2, 0.1, 0.7]]))
    assert choice.added is None


def test_a_gate_costs_two_projections_of_its_neurons_where_their_sub_expert_does_not_run() -> None:
    gates = PaperLayer(torch.arange(8, dtype=torch.int32)[None], torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]]))
    activations = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(0))
    weights = [[0.7, 0.3]] * 3
    for active, unused in ((1, 3), (2, 2), (4, 4), (6, 2), (8, 0)):
        extra = PaperMethod([gates], active, 2).choose(slots(activations, weights)).extra
        assert extra.tolist() == pytest.approx([unused * 2 * 2 / 3] * 3)


def test_a_fitted_layer_keeps_exactly_the_sub_experts_of_the_budget() -> None:
    fitted = fit_paper(layer(), layer(), SETTINGS)
    found, tokens = layer(), 40
    activations = torch.stack(
        [
            torch.stack(
                [
                    found.activations(found.x[t : t + 1], e)[0, fitted.perm[e].long()]
                    for e in found.expert_ids[t].tolist()
                ]
            )
            for t in range(tokens)
        ]
    )
    batch = Slots(
        0,
        found.x[:tokens],
        found.rms[:tokens],
        found.expert_ids[:tokens],
        found.router_weights[:tokens],
        activations,
        found.down,
    )
    for active in range(1, ROUTED * SUB_EXPERTS + 1):
        keep = PaperMethod([fitted], active, ROUTED).choose(batch).keep
        assert keep.sum((1, 2)).tolist() == [active * NEURONS // SUB_EXPERTS] * tokens


def test_an_expert_without_rows_stays_as_it_is_stored() -> None:
    found = layer()
    without = replace(found, expert_ids=found.expert_ids.clamp_max(RARE - 1))
    fitted = fit_paper(without, without, SETTINGS)
    assert np.array_equal(fitted.perm[RARE], np.arange(NEURONS))
    assert fitted.gate_neurons[RARE].tolist() == [[8 * group, 8 * group + 1] for group in range(SUB_EXPERTS)]


def test_settings_that_do_not_fit_the_experts_are_refused() -> None:
    assert HIDDEN < NEURONS
    for settings in (replace(SETTINGS, sub_experts=5), replace(SETTINGS, gate_neurons=9)):
        with pytest.raises(ValueError, match="sub-experts must be two or more and divide the neurons"):
            fit_paper(layer(), layer(), settings)
