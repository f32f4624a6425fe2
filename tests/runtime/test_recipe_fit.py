"""The recipe, fitted on tiny models: it meets budgets, repairs what it drops, and is deterministic."""

from dataclasses import replace

import pytest
import torch

from prism_runtime.refactor.allocation import LEVELS, layer_budgets, measure_losses
from prism_runtime.refactor.compensation import Trajectory, fit_compensation
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.fit import RecipeSettings, fit_recipe
from prism_runtime.refactor.gates import GateKind
from prism_runtime.refactor.masked import MaskedModel
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.thresholds import calibrate_thresholds, everything
from tests.runtime.models import ARCHITECTURES, VOCABULARY, tiny_model

SETTINGS = RecipeSettings(
    sub_experts=4, budgets_permille=(500,), fisher_samples=2, proposals=300, partition_rows=200, rank=4, kappa=None
)


def text(seed: int, count: int = 16, length: int = 64) -> list[TokenSequence]:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [TokenSequence("text", tuple(row)) for row in ids.tolist()]


def divergence(masked: MaskedModel, sequences: list[TokenSequence], method: ElasticMethod) -> float:
    full, sparse = masked.log_probabilities(sequences), masked.log_probabilities(sequences, method)
    return float((full.exp() * (full - sparse)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("allocation", ["single", "layer", "dp"])
def test_a_fitted_point_spends_its_budget_on_the_held_out_text(architecture: str, allocation: str) -> None:
    model = tiny_model(architecture)
    settings = replace(SETTINGS, allocation=allocation)
    fitted = fit_recipe(model, text(1), text(2), settings)
    masked = MaskedModel(model)
    masked.permute(fitted.perms)
    method = fitted.method(500)
    for sequences in (text(2)[:8], text(2)[8:]):
        masked.log_probabilities(sequences, method)
    assert masked.realised == pytest.approx(0.5, abs=0.005)
    if allocation == "layer":
        assert masked.realised_by_layer == pytest.approx([0.5] * len(masked.experts), abs=0.01)


def test_layers_get_the_budgets_of_the_knapsack_over_what_each_loses_alone() -> None:
    model = tiny_model("qwen3_moe")
    settings = replace(SETTINGS, allocation="dp", compensation=None)
    fitted = fit_recipe(model, text(1), text(2), settings)
    masked = MaskedModel(model)
    masked.permute(fitted.perms)
    losses = measure_losses(masked, text(2), fitted.gates)
    assert (losses.loss[:, :-1] > losses.loss[:, 1:]).mean() > 0.8
    assert losses.budget.mean(0) == pytest.approx(LEVELS, abs=0.25), "the gate costs, tiny experts more than large ones"
    masked.log_probabilities(text(2), fitted.method(500))
    assert masked.realised_by_layer == pytest.approx(layer_budgets(losses, 0.5).tolist(), abs=0.01)


@pytest.mark.parametrize("gate", ["pca", "prior"])
def test_a_point_of_any_gate_spends_its_budget(gate: GateKind) -> None:
    model = tiny_model("qwen3_moe")
    fitted = fit_recipe(model, text(1), text(2), replace(SETTINGS, gate=gate))
    masked = MaskedModel(model)
    masked.permute(fitted.perms)
    masked.log_probabilities(text(2), fitted.method(500))
    assert masked.realised == pytest.approx(0.5, abs=0.005)


def test_the_first_sweep_over_the_text_already_finds_thresholds_near_the_budget() -> None:
    model = tiny_model("qwen3_moe")
    fitted = fit_recipe(model, text(1), text(2), replace(SETTINGS, budgets_permille=()))
    masked = MaskedModel(model)
    masked.permute(fitted.perms)
    everything_runs = ElasticMethod(fitted.gates, everything(len(fitted.gates)))
    once = calibrate_thresholds(masked, text(2), everything_runs, 0.75, rounds=1)
    masked.log_probabilities(text(2), once)
    assert masked.realised == pytest.approx(0.75, abs=0.03)


def test_the_same_settings_give_the_same_bytes() -> None:
    first, second = (fit_recipe(tiny_model("qwen3_moe"), text(1), text(2), SETTINGS) for _ in range(2))
    for one, other in zip(first.perms, second.perms, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.points[500].log_tau, second.points[500].log_tau)


@pytest.mark.parametrize("trajectory", ["lockstep", "dense"])
def test_compensation_lowers_the_divergence_of_the_text_it_was_fitted_on(trajectory: Trajectory) -> None:
    model = tiny_model("qwen3_moe")
    fitted = fit_recipe(model, text(1), text(2), SETTINGS)
    masked = MaskedModel(model)
    masked.permute(fitted.perms)
    bare = calibrate_thresholds(masked, text(1), ElasticMethod(fitted.gates, everything(len(fitted.gates))), 0.5)
    repaired = fit_compensation(masked, text(1), bare, fitted.metric, 24, trajectory)
    assert divergence(masked, text(1), repaired) < 0.9 * divergence(masked, text(1), bare)


def test_without_a_budget_below_one_nothing_is_dropped_and_a_budget_of_nothing_is_refused() -> None:
    masked = MaskedModel(tiny_model("olmoe"))
    fitted = fit_recipe(masked.model, text(1), text(2), SETTINGS)
    everything_runs = ElasticMethod(fitted.gates, everything(len(fitted.gates)))
    masked.permute(fitted.perms)
    assert divergence(masked, text(3), everything_runs) < 1e-6
    with pytest.raises(ValueError, match="found 0"):
        calibrate_thresholds(masked, text(2), everything_runs, 0)
