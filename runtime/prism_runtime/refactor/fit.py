"""The recipe from end to end, in memory: text in; partition, gates, thresholds and compensation out.

    rows, metric ──► token factors ──► partition ──► gates ──► [a budget] thresholds ──► compensation ──► thresholds
                                        └─ again, less what compensation will repair

Everything is closed form but the partition's search; nothing is trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.kernels.selection import log_token_factor
from prism_runtime.refactor.allocation import LayerLosses, layer_budgets, measure_losses
from prism_runtime.refactor.compensation import Trajectory, fit_compensation
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.gates import EnergyForm, GateKind, fit_gate
from prism_runtime.refactor.layer_search import (
    Limits,
    PartitionSettings,
    energy_limits,
    partition_layer,
    starting_energies,
)
from prism_runtime.refactor.masked import Experts, LayerRows, MaskedModel, capture
from prism_runtime.refactor.metric import LayerMetric, fisher_metric, identity_metric, ordinary
from prism_runtime.refactor.sensitivity import fit_token_factor
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.thresholds import calibrate_thresholds, everything

CENTRE_BUDGET = 0.5
"""Whose drops the second pass of the partition takes the means of."""
LIMIT_ROWS = 256

Allocation = Literal["single", "layer", "dp"]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RecipeSettings:
    """Every ingredient, each with a way to leave it out.

    budgets_permille  points to fit thresholds and compensation for
    metric            "fisher" needs the model's backward pass; "identity" counts every direction alike
    token_factor      a fitted sensitivity of every token, beside 1 / rms
    centred           a second pass of the partition on what compensation will leave
    proposals         swaps the partition tries for an expert; None: as many as its neurons want
    partition_rows    rows of an expert that the partition reads
    kappa             gate outputs farther from the threshold than this many deviations are not computed; None: all are
    gate              what a sub-expert's output norm is predicted from
    allocation        one threshold over all layers, one a layer at equal budgets, or one a layer at budgets that a
                      knapsack over measured losses gives
    compensation      text the compensation is fitted along; None for none
    rank              of the compensation
    rounds            times that thresholds and compensation are fitted to each other
    fit_sequences     most sequences that a compensation is fitted on: their hidden states are held at once
    """

    sub_experts: int = 16
    budgets_permille: tuple[int, ...] = (750, 500, 250)
    metric: Literal["fisher", "identity"] = "fisher"
    fisher_samples: int = 4
    token_factor: bool = True
    starts: tuple[str, ...] = ("sorted",)
    proposals: int | None = None
    partition_rows: int = 4_000
    centred: bool = True
    kappa: float | None = 1.7
    gate: GateKind = "ridge"
    allocation: Allocation = "single"
    compensation: Trajectory | None = "lockstep"
    rank: int = 8
    rounds: int = 1
    fit_sequences: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FittedPoint:
    """One budget: log thresholds [L], and compensation a layer or None."""

    log_tau: Tensor
    compensation: Sequence[CompensationWeights] | None


@dataclass(frozen=True, slots=True)
class FittedRecipe:
    """What an artifact stores of a fit. perms [E, C] int32 a layer, points by per-mille of the budget."""

    perms: Sequence[Tensor]
    gates: Sequence[GateWeights]
    metric: Sequence[Tensor]
    points: dict[int, FittedPoint]

    def method(self, permille: int) -> ElasticMethod:
        """The method at one of the fitted budgets."""
        point = self.points[permille]
        return ElasticMethod(self.gates, point.log_tau, point.compensation, name=f"prism-{permille}")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What is measured on the calibration text before anything is fitted; one entry a layer."""

    rows: Sequence[LayerRows]
    metric: Sequence[LayerMetric]


@dataclass(frozen=True, slots=True)
class GatedPartition:
    """A partition and its gates, which every budget shares. perms [E, C] int32 and metric [H, H] a layer."""

    perms: Sequence[Tensor]
    gates: Sequence[GateWeights]
    metric: Sequence[Tensor]


def fit_recipe(
    model: PreTrainedModel,
    calibration: Sequence[TokenSequence],
    held: Sequence[TokenSequence],
    settings: RecipeSettings,
    report: Report = lambda _: None,
) -> FittedRecipe:
    """Fit on the calibration text, choose thresholds on the held-out one. `report` is told each step as it starts."""
    calibrated = calibrate_recipe(model, calibration, settings, report)
    masked = MaskedModel(model)
    gated = fit_gated(masked, calibrated, held, settings, report)
    losses = None
    if settings.allocation == "dp":
        report("losses of layers")
        losses = measure_losses(masked, held, gated.gates)
    points = {}
    for permille in settings.budgets_permille:
        report(f"budget {permille}")
        method = fit_budget(masked, calibration, held, gated.gates, gated.metric, permille / 1000, settings, losses)
        points[permille] = FittedPoint(method.log_tau, method.compensation)
    return FittedRecipe(gated.perms, gated.gates, gated.metric, points)


def calibrate_recipe(
    model: PreTrainedModel,
    calibration: Sequence[TokenSequence],
    settings: RecipeSettings,
    report: Report = lambda _: None,
) -> Calibrated:
    """Rows and metric of the calibration text."""
    report("calibrate")
    rows = capture(model, calibration)
    report("metric")
    return Calibrated(rows, measure_metric(model, calibration, settings))


def fit_gated(
    masked: MaskedModel,
    calibrated: Calibrated,
    held: Sequence[TokenSequence],
    settings: RecipeSettings,
    report: Report = lambda _: None,
) -> GatedPartition:
    """Partition and gates; `masked`, in the source's order on entry, stands in the partition afterwards."""
    rows, forms = calibrated.rows, [layer.form for layer in calibrated.metric]
    tokens = [
        fit_token_factor(*pair) if settings.token_factor else None
        for pair in zip(rows, _powers(calibrated.metric), strict=True)
    ]
    report("partition")
    perms = partition(masked, rows, forms, settings)
    gates = fit_gates(masked, rows, forms, tokens, settings)
    if settings.centred:
        report("partition again")
        every = ElasticMethod(gates, everything(len(rows)))
        by_layer = settings.allocation == "layer"
        bare = calibrate_thresholds(masked, held, every, CENTRE_BUDGET, by_layer=by_layer)
        perms = partition_again(masked, rows, forms, bare, perms, settings)
        gates = fit_gates(masked, rows, forms, tokens, settings)
    return GatedPartition(perms, gates, forms)


def measure_metric(
    model: PreTrainedModel, calibration: Sequence[TokenSequence], settings: RecipeSettings
) -> list[LayerMetric]:
    """The metric of every layer, as the settings ask."""
    if settings.metric == "fisher":
        return fisher_metric(model, calibration, settings.seed, settings.fisher_samples)
    experts = MaskedModel(model).experts
    return identity_metric(len(experts), experts[0].down.shape[2], sum(len(each.ids) for each in calibration))


def partition(
    masked: MaskedModel, rows: Sequence[LayerRows], forms: Sequence[Tensor], settings: RecipeSettings
) -> list[Tensor]:
    """First pass, from the settings' starts: [E, C] int32 a layer. `masked` is permuted accordingly."""
    asked = partition_settings(settings)
    kept = [layer.select(ordinary(layer.rms)) for layer in rows]
    layers = list(zip(masked.experts, kept, forms, strict=True))
    limits = energy_limits([starting_energies(*each, asked, layer=layer) for layer, each in enumerate(layers)])
    perms = [partition_layer(*each, asked, limits=limits, layer=layer) for layer, each in enumerate(layers)]
    masked.permute(perms)
    return perms


@dataclass(frozen=True, slots=True)
class Centre:
    """What the first pass of the partition gives the second: limits, means [E, C] a layer in the source's order."""

    limits: Limits
    means: Sequence[Tensor]


def centre(
    masked: MaskedModel,
    rows: Sequence[LayerRows],
    forms: Sequence[Tensor],
    bare: ElasticMethod,
    perms: Sequence[Tensor],
    sub_experts: int,
) -> Centre:
    """The means of what `bare` drops, weighted as scores are; `masked` is permuted by `perms`, rows are ordinary."""
    factors = [token_factors(layer, gate) for layer, gate in zip(rows, bare.gates, strict=True)]
    stood = list(zip(masked.experts, rows, forms, factors, strict=True))
    means = []
    for layer, (experts, layer_rows, _, factor) in enumerate(stood):
        dropped = _means_of_dropped(experts, layer_rows, factor, bare.gates[layer], bare.log_tau[layer])
        means.append(torch.zeros_like(dropped).scatter_(1, perms[layer].long(), dropped))
    return Centre(energy_limits([_energies(*each, sub_experts) for each in stood]), means)


def token_factors(rows: LayerRows, gate: GateWeights) -> Tensor:
    """[T]: what a token's output is multiplied by, beside the router weight."""
    return log_token_factor(rows.x, rows.rms, gate.token).exp()


def partition_again(
    masked: MaskedModel,
    rows: Sequence[LayerRows],
    forms: Sequence[Tensor],
    bare: ElasticMethod,
    perms: Sequence[Tensor],
    settings: RecipeSettings,
) -> list[Tensor]:
    """Second pass, from the first one's result: energies less the mean of what `bare` drops.

    `masked` is permuted by `perms` on entry, by the result afterwards.
    """
    kept = [layer.select(ordinary(layer.rms)) for layer in rows]
    centred = centre(masked, kept, forms, bare, perms, settings.sub_experts)
    masked.permute([torch.arange(perm.shape[1]).expand_as(perm) for perm in perms])
    again = [
        partition_layer(
            masked.experts[layer],
            kept[layer],
            forms[layer],
            partition_settings(settings),
            limits=centred.limits,
            layer=layer,
            factor=token_factors(kept[layer], bare.gates[layer]),
            means=centred.means[layer],
            start=perms[layer],
        )
        for layer in range(len(perms))
    ]
    masked.permute(again)
    return again


def fit_gates(
    masked: MaskedModel,
    rows: Sequence[LayerRows],
    forms: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    settings: RecipeSettings,
) -> list[GateWeights]:
    """The gate of every layer, for the partition that `masked` stands in."""
    return [
        fit_gate(experts, layer, form, settings.sub_experts, token, settings.kappa, settings.gate)
        for experts, layer, form, token in zip(masked.experts, rows, forms, tokens, strict=True)
    ]


def fit_budget(
    masked: MaskedModel,
    calibration: Sequence[TokenSequence],
    held: Sequence[TokenSequence],
    gates: Sequence[GateWeights],
    forms: Sequence[Tensor],
    budget: float,
    settings: RecipeSettings,
    losses: LayerLosses | None = None,
) -> ElasticMethod:
    """Thresholds and compensation of one budget, all costs counted on the held-out text; `losses` for allocation dp."""
    by_layer = settings.allocation != "single"
    shares = budget if losses is None else layer_budgets(losses, budget)
    start = ElasticMethod(gates, everything(len(gates)))
    method = calibrate_thresholds(masked, held, start, shares, by_layer=by_layer)
    if settings.compensation is None:
        return method
    text = _spread(calibration, settings.fit_sequences)
    for _ in range(settings.rounds):
        method = fit_compensation(masked, text, method, forms, settings.rank, settings.compensation)
        method = calibrate_thresholds(masked, held, method, shares, by_layer=by_layer)
    return method


def partition_settings(settings: RecipeSettings) -> PartitionSettings:
    """Of both passes."""
    return PartitionSettings(
        settings.sub_experts, settings.starts, settings.proposals, settings.partition_rows, settings.seed
    )


def _powers(metric: Sequence[LayerMetric]) -> list[Tensor]:
    return [layer.power for layer in metric]


def _energies(experts: Experts, rows: LayerRows, form: Tensor, factor: Tensor, sub_experts: int) -> Tensor:
    """[any]: energies of a sample of rows under the partition that the experts stand in."""
    found = []
    for expert in range(len(experts.down)):
        token, slot = (index[:LIMIT_ROWS] for index in rows.routed(expert))
        energy = EnergyForm(experts.down[expert], form, sub_experts).energies(
            experts.activations(rows.x[token], expert)
        )
        found.append((energy * (rows.router_weights[token, slot] * factor[token]).square()[:, None]).flatten())
    return torch.cat(found)


def _means_of_dropped(experts: Experts, rows: LayerRows, factor: Tensor, gate: GateWeights, log_tau: Tensor) -> Tensor:
    """[E, C]: mean activation of every neuron over the rows that drop its sub-expert, by the square of their weight."""
    count, neurons, _ = experts.down.shape
    means = torch.zeros(count, neurons)
    for expert in range(count):
        token, slot = rows.routed(expert)
        x = rows.x[token]
        scale = rows.router_weights[token, slot] * factor[token]
        score = x @ gate.weight[expert].t() + gate.bias[expert] + scale.log()[:, None]
        weight = (score < log_tau) * scale.square()[:, None]
        total = weight.sum(0).clamp(min=1e-12)
        activations = experts.activations(x, expert).view(len(x), len(total), -1)
        means[expert] = ((activations * weight[..., None]).sum(0) / total[:, None]).flatten()
    return means


def _spread(sequences: Sequence[TokenSequence], most: int) -> Sequence[TokenSequence]:
    """At most so many sequences, taken evenly over the text so that every domain is in it."""
    count = min(most, len(sequences))
    return [sequences[place * len(sequences) // count] for place in range(count)]
