"""The stages that read the calibration text: saliency, rows, metric, and the limits of the swap search."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TypeVar, overload

from torch import Tensor

from prism_runtime.refactor.calibrate import calibrate
from prism_runtime.refactor.compensation import Trajectory
from prism_runtime.refactor.fit import Allocation, RecipeSettings, measure_metric, partition_settings
from prism_runtime.refactor.gates import GateKind
from prism_runtime.refactor.layer_search import Limits, energy_limits, starting_energies
from prism_runtime.refactor.masked import Experts, LayerRows, MaskedModel, capture
from prism_runtime.refactor.memory import FLOAT32, lockstep_sequences
from prism_runtime.refactor.metric import ordinary
from prism_runtime.refactor.partition import Saliency
from prism_runtime.refactor.pipeline import Run
from prism_runtime.refactor.request import RefactorRequest
from prism_runtime.refactor.sensitivity import fit_token_factor
from prism_runtime.refactor.stages import Facts, Output, Stage

Item = TypeVar("Item")

GATES: dict[str, GateKind] = {"ridge": "ridge", "pca": "pca", "prior": "prior"}
ALLOCATIONS: dict[str, Allocation] = {"single": "single", "layer": "layer", "dp": "dp"}
COMPENSATIONS: dict[str, Trajectory | None] = {"lockstep": "lockstep", "dense": "dense", "none": None}


class OnDisk(Sequence[Item]):
    """One item a layer, read when it is asked for; the last two are kept. Threads may share it."""

    def __init__(self, layers: int, load: Callable[[int], Item]) -> None:
        self._layers = layers
        # Experts that are worked on at the same time share a layer; two meet where one ends.
        self._load = lru_cache(maxsize=2)(load)

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, layer: int) -> Item: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Item]: ...
    def __getitem__(self, layer: int | slice) -> Item | Sequence[Item]:
        if isinstance(layer, slice):
            return [self._load(each) for each in range(*layer.indices(self._layers))]
        if not 0 <= layer < self._layers:
            raise IndexError(layer)
        return self._load(layer)


class Calibration:
    """What is measured on the calibration text; each part once, when it is asked for. Layers count MoE layers.

    rows      of every layer, all tokens
    ordinary  rows without tokens of massive activations
    forms     [H, H] of every layer: the metric
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.settings = replace(recipe_settings(run.request), fit_sequences=_fit_sequences(run))
        layers = len(run.shape.moe_layers)
        self.saliency_stage = Stage.of("saliency", {}, run.root)
        self.rows_stages = [Stage.of(f"rows-{layer}", {}, run.root) for layer in range(layers)]
        metric = {"metric": self.settings.metric, "samples": self.settings.fisher_samples, "seed": self.settings.seed}
        self.metric_stages = [Stage.of(f"metric-{layer}", metric, self.rows_stages[layer]) for layer in range(layers)]
        self.limits_stage = Stage.of("limits", _search_parameters(self.settings), *self.metric_stages)
        self.rows = OnDisk(layers, self._load_rows)
        self.ordinary = OnDisk(layers, self._load_ordinary)
        self.forms = OnDisk(layers, self._load_form)

    @cached_property
    def saliency(self) -> list[Saliency]:
        """Of every MoE layer."""
        made = self._run.work.run(self.saliency_stage, self._measure_saliency).tensors
        layers = range(len(self._run.shape.moe_layers))
        return [Saliency(*(made[f"{layer}.{name}"] for name in Saliency.__slots__)) for layer in layers]

    @cached_property
    def masked(self) -> MaskedModel:
        """Permuted by whoever uses it."""
        return MaskedModel(self._run.model)

    @property
    def experts(self) -> Sequence[Experts]:
        """In the source's order, in the model's memory."""
        return self.masked.source

    @cached_property
    def limits(self) -> Limits:
        """Of the swap search's objective, over all layers."""
        facts = self._run.work.run(self.limits_stage, self._measure_limits).facts
        return Limits(tuple(facts["energy"]), tuple(facts["weights"]))

    def ensure_rows(self) -> None:
        """Run the stages of `rows`."""
        self._run.work.run_together(self.rows_stages, self._capture)

    def ensure_metric(self) -> None:
        """Run the stages of `rows` and `forms`."""
        self.ensure_rows()
        self._run.work.run_together(self.metric_stages, self._measure_metric)

    def token_factor(self, layer: int) -> Tensor | None:
        """[H + 3], or None if the settings leave it out."""
        if not self.settings.token_factor:
            return None
        (metric,) = self._run.work.require([self.metric_stages[layer]])
        return fit_token_factor(self.rows[layer], metric.tensors["power"])

    def _measure_limits(self) -> Output:
        asked = partition_settings(self.settings)
        layers = zip(self.experts, self.ordinary, self.forms, strict=True)
        found = energy_limits([starting_energies(*each, asked, layer=layer) for layer, each in enumerate(layers)])
        return Output(facts={"energy": found.energy, "weights": found.weights})

    def _measure_saliency(self) -> Output:
        texts = self._run.texts.calibration
        with self._run.reporter.bar("calibrate", len(texts), "sequences") as advance:
            measured = calibrate(self._run.model, texts, advance)
        return Output(
            {
                f"{layer}.{name}": getattr(saliency, name)
                for layer, saliency in enumerate(measured)
                for name in Saliency.__slots__
            }
        )

    def _capture(self) -> list[Output]:
        texts = self._run.texts.calibration
        with self._run.reporter.bar("capture", len(texts), "sequences") as advance:
            captured = capture(self._run.model, texts, advance)
        return [Output({name: getattr(rows, name) for name in LayerRows.__slots__}) for rows in captured]

    def _measure_metric(self) -> list[Output]:
        self._run.reporter.say(f"measure the metric ({self.settings.metric})")
        measured = measure_metric(self._run.model, self._run.texts.calibration, self.settings)
        return [Output({"form": metric.form, "power": metric.power}) for metric in measured]

    def _load_rows(self, layer: int) -> LayerRows:
        (rows,) = self._run.work.require([self.rows_stages[layer]])
        return LayerRows(**rows.tensors)

    def _load_ordinary(self, layer: int) -> LayerRows:
        rows = self.rows[layer]
        return rows.select(ordinary(rows.rms))

    def _load_form(self, layer: int) -> Tensor:
        (metric,) = self._run.work.require([self.metric_stages[layer]])
        return metric.tensors["form"]


def recipe_settings(request: RefactorRequest) -> RecipeSettings:
    """The recipe that a request asks for."""
    return RecipeSettings(
        sub_experts=request.sub_experts,
        metric="identity" if request.metric == "identity" else "fisher",
        token_factor="token-factor" not in request.without,
        centred="second-pass" not in request.without,
        kappa=None if "adaptive-gate" in request.without else RecipeSettings().kappa,
        gate=GATES[request.gate],
        allocation=ALLOCATIONS[request.allocation],
        compensation=COMPENSATIONS[request.compensation],
        rank=request.rank,
        seed=request.seed,
    )


def _fit_sequences(run: Run) -> int:
    model_bytes = sum(FLOAT32 * parameter.numel() for parameter in run.model.parameters())
    return lockstep_sequences(run.shape.hidden, run.texts.length, model_bytes)


def _search_parameters(settings: RecipeSettings) -> Facts:
    asked = partition_settings(settings)
    return {name: getattr(asked, name) for name in ("sub_experts", "starts", "proposals", "rows", "seed")}
