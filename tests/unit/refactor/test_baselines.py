"""Baselines on one layer of two experts with four neurons, whose right choice is plain."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prism_runtime.refactor.baselines import (
    NeuronEnergies,
    OracleGate,
    Prefix,
    PriorGate,
    RandomSubExperts,
    StaticMask,
    TopK,
    calibrate_threshold,
    contiguous_groups,
    random_groups,
    sorted_groups,
    strongest_neurons,
)
from prism_runtime.refactor.method import Method, Slots
from prism_runtime.refactor.text import TokenSequence

torch.set_num_threads(1)

ACTIVATIONS = torch.tensor([[[4.0, 0, 0, 1], [0.0, 3, 2, 0]], [[0.0, 0, 0, 1], [5.0, 5, 5, 5]]])
SLOTS = Slots(
    layer=0,
    x=torch.zeros(2, 3),
    rms=torch.ones(2),
    expert_ids=torch.tensor([[0, 1], [1, 0]]),
    router_weights=torch.tensor([[0.75, 0.25], [0.4, 0.6]]),
    activations=ACTIVATIONS,
    down=torch.tensor([1.0, 0, 0]).expand(2, 4, 3),
)


def kept(method: Method, slots: Slots = SLOTS) -> list[list[list[int]]]:
    return method.choose(slots).keep.int().tolist()


def with_threshold(gate: OracleGate | PriorGate, log_tau: float) -> OracleGate | PriorGate:
    gate.log_tau = torch.tensor([log_tau])
    return gate


class OneLayer:
    """A model of one MoE layer that sees `SLOTS` whatever the text."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.kept_share = 0.0

    def log_probabilities(self, batch: Sequence[TokenSequence], method: Method | None) -> Tensor:
        assert method is not None
        self.kept_share = float(method.choose(self.slots).keep.float().mean())
        return torch.zeros(1)


def test_top_k_keeps_the_experts_of_the_largest_weights_wherever_they_stand() -> None:
    assert kept(TopK(1)) == [[[1] * 4, [0] * 4], [[0] * 4, [1] * 4]]


def test_plain_top_k_leaves_the_router_weights_alone() -> None:
    assert torch.equal(TopK(1).choose(SLOTS).router_weights, SLOTS.router_weights)


def test_renormalised_top_k_gives_survivors_the_weight_of_all() -> None:
    weights = TopK(1, renormalised=True).choose(replace(SLOTS, router_weights=SLOTS.router_weights * 2)).router_weights
    assert weights[0, 0] == pytest.approx(2.0)
    assert weights[1, 1] == pytest.approx(2.0)


def test_random_choice_runs_exactly_its_number_of_whole_sub_experts_for_every_token() -> None:
    slots = replace(SLOTS, activations=torch.zeros(2, 2, 4))
    for seed in range(5):
        keep = RandomSubExperts(3, sub_experts=2, seed=seed).choose(slots).keep.view(2, 4, 2)
        assert keep.all(-1).sum(-1).tolist() == [3, 3]
        assert keep.any(-1).sum(-1).tolist() == [3, 3]


def test_prefix_counts_go_by_router_rank() -> None:
    counts = torch.tensor([[2, 1]])
    assert kept(Prefix("prefix", counts, sub_experts=2)) == [[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]]


def test_a_static_mask_is_that_of_the_expert_for_every_token() -> None:
    masks = [torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)]
    assert kept(StaticMask("static", masks)) == [[[1, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 1], [1, 0, 0, 0]]]


def test_the_neuron_oracle_keeps_neurons_by_router_weighted_output() -> None:
    gate = OracleGate("neuron oracle", contiguous_groups((2, 4), 1, 4), 4)
    # Weighted outputs: 3, 0, 0, .75 | 0, .75, .5, 0 and 0, 0, 0, .4 | 3, 3, 3, 3.
    assert kept(with_threshold(gate, float(torch.tensor(0.7).log()))) == [
        [[1, 0, 0, 1], [0, 1, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1]],
    ]


def test_the_oracle_norm_counts_neurons_that_cancel_each_other() -> None:
    down = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 1, 0]]).expand(2, 4, 3)
    slots = replace(SLOTS, activations=torch.ones(2, 2, 4), router_weights=torch.ones(2, 2), down=down)
    scores = OracleGate("oracle", contiguous_groups((2, 4), 1, 2), 2).log_scores(slots).exp()
    assert scores[0, 0].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)


def test_the_oracle_measures_in_its_metric_and_by_the_residual() -> None:
    slots = replace(SLOTS, rms=torch.tensor([2.0, 1.0]))
    gate = OracleGate("oracle", contiguous_groups((2, 4), 1, 1), 1, metric=[torch.diag(torch.tensor([9.0, 1, 1]))])
    assert gate.log_scores(slots).exp()[0, 0, 0] == pytest.approx(3 * 0.75 * 5 / 2)


def test_the_oracle_keeps_whole_groups_of_scattered_neurons() -> None:
    groups = [torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0]])]
    keep = kept(with_threshold(OracleGate("oracle", groups, 2), float(torch.tensor(1.0).log())))
    assert keep == [[[1, 0, 0, 1], [0, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]]


@pytest.mark.parametrize("metric", [None, [torch.eye(3) * 4]])
def test_neuron_energies_are_router_weighted_means_over_an_experts_tokens(metric: list[Tensor] | None) -> None:
    collector = NeuronEnergies(metric)
    assert collector.choose(SLOTS).keep.all()
    scale = 1 if metric is None else 4
    first = (0.75**2 * 16 + 0.6**2 * 25) / (0.75**2 + 0.6**2)
    assert collector.of_layers()[0][0, 0] == pytest.approx(scale * first)


def test_the_static_prior_ranks_sub_experts_by_mean_energy_and_router_weight() -> None:
    energies = [torch.tensor([[16.0, 0, 0, 1], [1.0, 1, 1, 1]])]
    groups = sorted_groups(energies, 2)
    gate = PriorGate("static", groups, 2, energies)
    assert gate.log_scores(SLOTS).exp()[0].tolist() == [
        pytest.approx([0.75 * 17**0.5, 0.0], abs=1e-6),
        pytest.approx([0.25 * 2**0.5] * 2),
    ]


def test_sorted_groups_and_strongest_neurons_follow_each_experts_energy() -> None:
    energies = [torch.tensor([[1.0, 4, 2, 3], [4.0, 3, 2, 1]])]
    assert sorted_groups(energies, 2)[0].tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert strongest_neurons(energies, 0.5)[0].int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]


def test_random_groups_are_of_one_size_and_differ_between_experts() -> None:
    groups = random_groups((3, 64), layers=2, sub_experts=4)
    assert all((cut == number).sum(-1).tolist() == [16] * 3 for cut in groups for number in range(4))
    assert not torch.equal(groups[0][0], groups[0][1])


def test_a_calibrated_threshold_runs_the_asked_share() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 500
    slots = Slots(
        layer=0,
        x=torch.zeros(tokens, 3),
        rms=torch.ones(tokens),
        expert_ids=torch.tensor([[0, 1]]).expand(tokens, 2),
        router_weights=torch.rand(tokens, 2, generator=generator) + 0.1,
        activations=torch.randn(tokens, 2, 32, generator=generator),
        down=torch.randn(2, 32, 3, generator=generator),
    )
    model = OneLayer(slots)
    gate = OracleGate("oracle", contiguous_groups((2, 32), 1, 16), 16)
    calibrate_threshold(model, gate, [TokenSequence("text", (1,))], 0.3)
    model.log_probabilities([], gate)
    assert model.kept_share == pytest.approx(0.3, abs=0.001)
