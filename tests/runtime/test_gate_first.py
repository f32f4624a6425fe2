"""Neuron-level selection by the gate projection: what it scores, what it costs, what it keeps."""

import pytest
import torch

from prism_runtime.refactor.baselines import RandomSubExperts
from prism_runtime.refactor.compensation import Repaired, fit_repair
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.fit import RecipeSettings, fit_gates
from prism_runtime.refactor.gate_first import GATE_SHARE, GateFirst, SlicesThenNeurons
from prism_runtime.refactor.masked import MaskedModel, capture
from prism_runtime.refactor.method import Choice, Method, Slots
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.thresholds import calibrate_thresholds, everything
from tests.runtime.models import LAYERS, prompts, tiny_model

torch.set_num_threads(1)


def text(lengths: list[int]) -> list[TokenSequence]:
    return [TokenSequence("text", ids) for ids in prompts(lengths)]


def gate_first(masked: MaskedModel, sequences: list[TokenSequence]) -> GateFirst:
    metric = [torch.eye(masked.experts[0].down.shape[2])] * LAYERS
    return GateFirst("gate first", masked.experts, capture(masked.model, sequences), metric)


class Compare:
    """Keeps everything and holds each neuron's score against the log of its weighted output's norm."""

    name = "compare"

    def __init__(self, gate: GateFirst) -> None:
        self._gate = gate
        self.differences: list[torch.Tensor] = []

    def choose(self, slots: Slots) -> Choice:
        norms = slots.activations.abs() * slots.down.norm(dim=-1)[slots.expert_ids]
        true = (norms * (slots.router_weights / slots.rms[:, None])[..., None]).log()
        self.differences.append((self._gate.log_scores(slots) - true).flatten())
        return self._gate.keep(slots, torch.ones_like(slots.activations, dtype=torch.bool))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_score_is_the_true_norm_for_a_token_whose_up_projection_is_the_usual_one(architecture: str) -> None:
    masked = MaskedModel(tiny_model(architecture))
    single = text([1])
    compare = Compare(gate_first(masked, single))
    masked.log_probabilities(single, compare)
    differences = torch.cat(compare.differences)
    assert len(differences) >= LAYERS * 2 * 32
    torch.testing.assert_close(differences, torch.zeros_like(differences), rtol=0, atol=1e-3)


def test_gate_projection_is_paid_for_every_neuron_and_the_rest_for_those_that_run() -> None:
    masked = MaskedModel(tiny_model("mixtral"))
    gate = gate_first(masked, text([20] * 4))
    gate.log_tau = torch.full((LAYERS,), torch.inf)
    masked.log_probabilities(text([20]), gate)
    assert masked.realised == pytest.approx(1 / 3)
    masked.reset()
    gate.log_tau = torch.full((LAYERS,), -torch.inf)
    masked.log_probabilities(text([20]), gate)
    assert masked.realised == 1


@pytest.mark.parametrize("budget", [0.5, 0.75])
def test_threshold_spends_the_budget_and_loses_less_than_chance(budget: float) -> None:
    masked, sequences = MaskedModel(tiny_model("mixtral")), text([40] * 8)
    full = masked.log_probabilities(sequences)

    def divergence(method: GateFirst | RandomSubExperts) -> float:
        masked.reset()
        return float((full.exp() * (full - masked.log_probabilities(sequences, method))).sum(-1).mean())

    gate = calibrate_thresholds(masked, sequences, gate_first(masked, sequences), budget, by_layer=True)
    neurons = masked.experts[0].down.shape[1]
    chosen, realised = divergence(gate), masked.realised
    kept = (budget - GATE_SHARE) / (1 - GATE_SHARE)
    chance = divergence(RandomSubExperts(round(kept * 2 * neurons), neurons))
    assert realised == pytest.approx(budget, abs=0.003)
    assert chosen < 0.7 * chance


def slices(masked: MaskedModel, sequences: list[TokenSequence], budget: float) -> ElasticMethod:
    rows, settings = capture(masked.model, sequences), RecipeSettings(sub_experts=4, kappa=None)
    metric = [torch.eye(masked.experts[0].down.shape[2])] * LAYERS
    gates = fit_gates(masked, rows, metric, [None] * LAYERS, settings)
    return calibrate_thresholds(masked, sequences, ElasticMethod(gates, everything(LAYERS)), budget)


def slices_then_neurons(masked: MaskedModel, sequences: list[TokenSequence], cut: ElasticMethod) -> SlicesThenNeurons:
    metric = [torch.eye(masked.experts[0].down.shape[2])] * LAYERS
    return SlicesThenNeurons("both", masked.experts, capture(masked.model, sequences), metric, cut)


def test_slices_then_neurons_runs_no_neuron_of_a_dropped_slice_and_spares_its_gate_rows() -> None:
    masked, sequences = MaskedModel(tiny_model("mixtral")), text([40] * 8)
    cut = slices(masked, sequences, 0.6)
    method = slices_then_neurons(masked, sequences, cut)
    masked.reset()
    masked.log_probabilities(sequences, cut)
    of_slices, gate_cost = masked.realised, 4 / 3 / masked.experts[0].down.shape[1]

    def realised(threshold: float) -> float:
        method.log_tau = torch.full((LAYERS,), threshold)
        masked.reset()
        found = masked.log_probabilities(sequences, method)
        if threshold == -torch.inf:
            torch.testing.assert_close(found, masked.log_probabilities(sequences, cut))
        return masked.realised

    assert realised(-torch.inf) == pytest.approx(of_slices)
    # Without a kept neuron later layers see another trajectory, so only the share that survives may differ a little.
    assert realised(torch.inf) == pytest.approx((of_slices - gate_cost) / 3 + gate_cost, abs=0.03)


def test_slices_then_neurons_spends_its_budget() -> None:
    masked, sequences = MaskedModel(tiny_model("mixtral")), text([40] * 8)
    method = slices_then_neurons(masked, sequences, slices(masked, sequences, 0.7))
    method = calibrate_thresholds(masked, sequences, method, 0.5, by_layer=True)
    masked.reset()
    masked.log_probabilities(sequences, method)
    assert masked.realised == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("of_slices", [False, True])
def test_compensation_repairs_what_neurons_are_dropped_and_is_paid_for(of_slices: bool) -> None:
    masked, sequences = MaskedModel(tiny_model("mixtral")), text([40] * 8)
    full = masked.log_probabilities(sequences)
    metric = [torch.eye(masked.experts[0].down.shape[2])] * LAYERS

    def measured(method: Method) -> tuple[float, float]:
        masked.reset()
        divergence = (full.exp() * (full - masked.log_probabilities(sequences, method))).sum(-1).mean()
        return float(divergence), masked.realised

    method = gate_first(masked, sequences)
    if of_slices:
        method = slices_then_neurons(masked, sequences, slices(masked, sequences, 0.8))
    bare = calibrate_thresholds(masked, sequences, method, 0.6, by_layer=True)
    repaired = Repaired(bare, fit_repair(masked, sequences, bare, metric, rank=1, sub_experts=4))
    _, untouched = measured(bare)
    _, with_repair = measured(repaired)
    assert with_repair > untouched
    again = calibrate_thresholds(masked, sequences, repaired, 0.6, by_layer=True)
    assert measured(again)[1] == pytest.approx(0.6, abs=0.01)

    rich = Repaired(bare, fit_repair(masked, sequences, bare, metric, rank=24, sub_experts=4))
    assert measured(rich)[0] < 0.9 * measured(bare)[0]


def test_budget_below_the_gate_projections_cost_is_refused() -> None:
    masked, sequences = MaskedModel(tiny_model("mixtral")), text([40] * 2)
    with pytest.raises(ValueError, match=r"budget 0\.250 is below 0\.333, what choosing alone costs"):
        calibrate_thresholds(masked, sequences, gate_first(masked, sequences), 0.25, by_layer=True)
