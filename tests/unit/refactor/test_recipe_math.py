"""Gates, thresholds, compensation and costs, where the right answer is known in closed form."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.kernels.selection import gate_scores
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.gates import ENERGY_FLOOR, PENALTY, EnergyForm, fit_gate
from prism_runtime.refactor.masked import Experts, LayerRows, activations_of_slots
from prism_runtime.refactor.method import Slots
from prism_runtime.refactor.ridge import RidgeSums
from prism_runtime.refactor.sensitivity import fit_token_factor

EXPERTS, SLOTS, NEURONS, SUB_EXPERTS, HIDDEN, TOKENS = 3, 2, 8, 4, 6, 400


@pytest.fixture
def experts() -> Experts:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(EXPERTS, NEURONS, HIDDEN, generator=generator) for _ in range(3))
    return Experts(gate, up, down, None, lambda gate, up: torch.nn.functional.silu(gate) * up)


@pytest.fixture
def rows() -> LayerRows:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, SLOTS, generator=generator) + 0.1
    return LayerRows(x, torch.rand(TOKENS, generator=generator) + 0.5, ids, weights)


@pytest.fixture
def metric() -> Tensor:
    root = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))
    return root @ root.t()


def slots_of(experts: Experts, rows: LayerRows) -> Slots:
    return Slots(
        0, rows.x, rows.rms, rows.expert_ids, rows.router_weights, activations_of_slots(experts, rows), experts.down
    )


def method(gate: GateWeights, log_tau: float, compensation: CompensationWeights | None = None) -> ElasticMethod:
    return ElasticMethod([gate], torch.tensor([log_tau]), compensation and [compensation])


def test_ridge_from_sums_is_the_least_squares_of_the_rows_with_the_penalty_as_further_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    features, targets = torch.randn(50, 5, generator=generator), torch.randn(50, 2, generator=generator)
    weights = torch.rand(50, generator=generator)
    sums = RidgeSums(5, 2)
    for part in (slice(0, 20), slice(20, 50)):
        sums.add(features[part], targets[part], weights[part])
    root = weights.sqrt()[:, None].double()
    weighted = features.double() * root
    diagonal = weighted.square().sum(0)
    scale = torch.cat([diagonal[:3].mean().expand(3), diagonal[3:].mean().expand(2)])
    stacked = torch.cat([weighted, (0.1 * scale).sqrt().diag()])
    padded = torch.cat([targets.double() * root, torch.zeros(5, 2, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, padded).solution
    torch.testing.assert_close(sums.solve(0.1, (3, 2)).double(), expected, rtol=1e-4, atol=1e-6)


def test_energies_are_the_metric_of_every_sub_experts_own_output(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    activations = experts.activations(rows.x, 1)
    found = EnergyForm(experts.down[1], metric, SUB_EXPERTS).energies(activations)
    width = NEURONS // SUB_EXPERTS
    for group in range(SUB_EXPERTS):
        at = slice(group * width, (group + 1) * width)
        output = activations[:, at] @ experts.down[1, at]
        expected = ((output @ metric) * output).sum(1)
        torch.testing.assert_close(found[:, group], expected, rtol=1e-3, atol=1e-4)


def test_gate_is_the_ridge_of_log_norms_with_a_bias_that_keeps_the_mean_energy(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    for expert in range(EXPERTS):
        x = rows.x[rows.routed(expert)[0]]
        energy = EnergyForm(experts.down[expert], metric, SUB_EXPERTS).energies(experts.activations(x, expert))
        target = 0.5 * (energy + ENERGY_FLOOR * energy.mean(0)).log()
        features = torch.cat((x, torch.ones(len(x), 1)), 1).double()
        gram = features.t() @ features
        penalty = PENALTY * gram.diagonal().mean() * torch.eye(HIDDEN + 1)
        expected = torch.linalg.solve(gram + penalty, features.t() @ target.double())[:-1].t()
        torch.testing.assert_close(gate.weight[expert], expected.float(), rtol=1e-2, atol=1e-3)
        prediction = x @ gate.weight[expert].t() + gate.bias[expert]
        torch.testing.assert_close((2 * prediction).exp().mean(0), energy.mean(0), rtol=1e-3, atol=0)
        torch.testing.assert_close(gate.mean[expert], prediction.mean(0), rtol=1e-4, atol=1e-5)


def test_a_prior_scores_every_token_by_the_mean_energy_and_never_multiplies(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None, "prior")
    x = rows.x[rows.routed(1)[0]]
    energy = EnergyForm(experts.down[1], metric, SUB_EXPERTS).energies(experts.activations(x, 1))
    torch.testing.assert_close((2 * gate.bias[1]).exp(), energy.mean(0), rtol=1e-3, atol=0)
    scores, outputs = gate_scores(rows.x, rows.expert_ids, rows.router_weights.log(), gate, torch.tensor(-1.0))
    torch.testing.assert_close(scores, gate.bias[rows.expert_ids] + rows.router_weights.log()[..., None])
    assert int(outputs.sum()) == 0


def test_a_gate_of_all_components_is_the_ridge_and_one_of_few_lies_in_their_span(
    experts: Experts, rows: LayerRows, metric: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ridge = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    every = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None, "pca")
    torch.testing.assert_close(every.weight, ridge.weight, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(every.bias, ridge.bias, rtol=2e-2, atol=2e-3)
    monkeypatch.setattr("prism_runtime.refactor.gates.COMPONENTS", 2)
    few = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None, "pca")
    sizes = torch.linalg.svdvals(few.weight.flatten(0, 1))
    assert sizes[2] < 0.02 * sizes[0], "but for the rounding to bfloat16, weights are made of two directions"


def test_an_expert_that_the_text_never_reached_still_has_a_finite_gate(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    unseen = replace(rows, expert_ids=rows.expert_ids.clamp(max=EXPERTS - 2))
    gate = fit_gate(experts, unseen, metric, SUB_EXPERTS, None, None)
    assert torch.isfinite(gate.bias).all()
    assert torch.isfinite(gate.weight).all()


def test_an_expert_with_few_rows_gets_a_gate_that_is_no_worse_on_unseen_rows_than_no_gate(
    experts: Experts, metric: Tensor
) -> None:
    generator = torch.Generator().manual_seed(9)
    seen, unseen = (
        LayerRows(
            torch.randn(count, HIDDEN, generator=generator),
            torch.ones(count),
            torch.zeros(count, 1, dtype=torch.int64),
            torch.ones(count, 1),
        )
        for count in (HIDDEN + 2, 500)
    )
    gate = fit_gate(experts, seen, metric, SUB_EXPERTS, None, None)
    form = EnergyForm(experts.down[0], metric, SUB_EXPERTS)
    target = 0.5 * form.energies(experts.activations(unseen.x, 0)).log()
    residual = target - unseen.x @ gate.weight[0].t()
    assert residual.var(0).mean() < 1.1 * target.var(0).mean()


def test_token_factor_recovers_a_sensitivity_that_is_linear_in_the_input(rows: LayerRows) -> None:
    direction = torch.linspace(-1, 1, HIDDEN)
    sensitivity = rows.x @ direction
    weight = fit_token_factor(rows, sensitivity.exp() / rows.rms.square())
    features = torch.cat((rows.x, rows.rms[:, None], rows.rms.log()[:, None], torch.ones(TOKENS, 1)), 1)
    assert torch.corrcoef(torch.stack((features @ weight, sensitivity)))[0, 1] > 0.99
    assert float((features @ weight).mean()) == pytest.approx(0, abs=1e-4)


def test_a_lower_threshold_keeps_a_superset_and_none_keeps_all(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    slots = slots_of(experts, rows)
    kept = [method(gate, tau).choose(slots).keep for tau in (2.0, 1.0, 0.0, -1.0, -torch.inf)]
    assert kept[-1].all()
    assert 0 < int(kept[0].sum()) < int(kept[2].sum()) < kept[-1].numel()
    for tighter, looser in itertools.pairwise(kept):
        assert not (tighter & ~looser).any()


def test_every_token_keeps_a_sub_expert_whatever_the_threshold(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    keep = method(gate, torch.inf).choose(slots_of(experts, rows)).keep
    assert (keep.sum((1, 2)) == NEURONS // SUB_EXPERTS).all()


def test_an_adaptive_gate_costs_less_and_differs_only_where_the_mean_is_far_from_the_threshold(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    slots = slots_of(experts, rows)
    every = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    adaptive = fit_gate(experts, rows, metric, SUB_EXPERTS, None, 1.0)
    whole, cheap = method(every, 0.5).choose(slots), method(adaptive, 0.5).choose(slots)
    assert float(whole.extra.mean()) == pytest.approx(SLOTS * SUB_EXPERTS / 3)
    assert cheap.extra.mean() < whole.extra.mean()
    differing = (whole.keep != cheap.keep)[..., :: NEURONS // SUB_EXPERTS]
    log_scale = (rows.router_weights / rows.rms[:, None]).log()[..., None]
    distance = (0.5 - log_scale - adaptive.mean[rows.expert_ids]).abs() / adaptive.deviation[rows.expert_ids]
    assert (distance[differing] >= 1.0).all()


def test_compensation_adds_its_product_and_costs_its_two_products_and_a_row_for_every_dropped_cell(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    generator = torch.Generator().manual_seed(7)
    rank = 3
    weights = CompensationWeights(
        torch.randn(HIDDEN + 1, rank, generator=generator),
        torch.randn(rank, HIDDEN, generator=generator),
        torch.randn(EXPERTS, SUB_EXPERTS, rank, generator=generator),
    )
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, None)
    slots = slots_of(experts, rows)
    plain, choice = method(gate, 0.5).choose(slots), method(gate, 0.5, weights).choose(slots)
    dropped = ~choice.keep[..., :: NEURONS // SUB_EXPERTS]
    token = int(dropped.sum((1, 2)).argmax())
    inner = torch.cat((rows.x[token], torch.ones(1))) @ weights.a
    for slot in range(SLOTS):
        for cell in dropped[token, slot].nonzero().flatten().tolist():
            inner = inner + rows.router_weights[token, slot] * weights.c[rows.expert_ids[token, slot], cell]
    assert choice.added is not None
    torch.testing.assert_close(choice.added[token], inner @ weights.u, rtol=1e-4, atol=1e-4)
    expected = (2 * rank * HIDDEN + rank * dropped.sum((1, 2))) / (3 * HIDDEN)
    torch.testing.assert_close(choice.extra - plain.extra, expected)


def test_a_batch_keeps_exactly_its_share_and_the_highest_scores_of_all_tokens(
    experts: Experts, rows: LayerRows, metric: Tensor
) -> None:
    gate = fit_gate(experts, rows, metric, SUB_EXPERTS, None, 1.7)
    slots = slots_of(experts, rows)
    shared = replace(method(gate, 0.0), mode="batch", share=[0.5])
    keep, _ = shared.cells(slots)
    assert int(keep.sum()) == round(0.5 * keep.numel())
    scores = shared.scores(slots)
    others = keep.clone()
    others[:, :, 0] = False  # the floor may keep a first sub-expert of a low score
    assert scores[others].min() >= scores[~keep].max()
