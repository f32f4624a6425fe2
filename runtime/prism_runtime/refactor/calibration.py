"""The stages that read the calibration text: saliency, rows, metric, and the limits of the swap search."""

from functools import cached_property, lru_cache

from prism_runtime.refactor.calibrate import calibrate
from prism_runtime.refactor.layer_search import Limits, PartitionSettings, energy_limits, starting_energies
from prism_runtime.refactor.masked import Experts, LayerRows, capture, layer_experts
from prism_runtime.refactor.metric import LayerMetric, fisher_metric, identity_metric, ordinary
from prism_runtime.refactor.partition import Saliency
from prism_runtime.refactor.pipeline import Run
from prism_runtime.refactor.stages import Output, Stage, seed_of


class Calibration:
    """What is measured on the calibration text; each part once, when it is asked for. Layers count MoE layers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._layers = range(len(run.shape.moe_layers))
        self.saliency_stage = Stage.of("saliency", {}, run.root)
        self.rows_stages = [Stage.of(f"rows-{layer}", {}, run.root) for layer in self._layers]
        metric = {"metric": run.request.metric, "seed": run.request.seed}
        self.metric_stages = [
            Stage.of(f"metric-{layer}", metric, self.rows_stages[layer], run.root) for layer in self._layers
        ]
        # Threads of neighbouring experts share what they read; two layers meet where one ends.
        self.rows = lru_cache(maxsize=2)(self._load_rows)
        self.metric = lru_cache(maxsize=2)(self._load_metric)

    @cached_property
    def saliency(self) -> list[Saliency]:
        """Of every MoE layer."""
        made = self._run.work.run(self.saliency_stage, self._measure_saliency).tensors
        return [Saliency(*(made[f"{layer}.{name}"] for name in Saliency.__slots__)) for layer in self._layers]

    @cached_property
    def experts(self) -> list[Experts]:
        return layer_experts(self._run.model)

    def ensure_rows(self) -> None:
        """Run the stages of `rows`."""
        self._run.work.run_together(self.rows_stages, self._capture)

    def ensure_metric(self) -> None:
        """Run the stages of `rows` and `metric`."""
        self.ensure_rows()
        self._run.work.run_together(self.metric_stages, self._measure_metric)

    def limits_stage(self, settings: PartitionSettings) -> Stage:
        parameters = {"sub_experts": settings.sub_experts, "starts": settings.starts, "seed": settings.seed}
        return Stage.of("limits", parameters, *self.metric_stages)

    def limits(self, settings: PartitionSettings) -> Limits:
        """Of the swap search's objective, over all layers."""

        def measure() -> Output:
            found = energy_limits(
                [
                    starting_energies(
                        self.experts[layer], self.rows(layer), self.metric(layer).form, settings, layer=layer
                    )
                    for layer in self._layers
                ]
            )
            return Output(facts={"energy": found.energy, "weights": found.weights})

        facts = self._run.work.run(self.limits_stage(settings), measure).facts
        return Limits(tuple(facts["energy"]), tuple(facts["weights"]))

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
        texts, seed = self._run.texts.calibration, seed_of(self._run.request.seed, 0)
        if self._run.request.metric == "identity":
            tokens = sum(len(sequence.ids) for sequence in texts)
            measured = identity_metric(len(self._layers), self._run.shape.hidden, tokens)
        else:
            with self._run.reporter.bar("metric", len(texts), "sequences") as advance:
                measured = fisher_metric(self._run.model, texts, seed, advance=advance)
        return [Output({"form": metric.form, "power": metric.power}) for metric in measured]

    def _load_rows(self, layer: int) -> LayerRows:
        """Rows of one layer, without tokens of massive activations."""
        rows = self._stored_rows(layer)
        return rows.select(ordinary(rows.rms))

    def _load_metric(self, layer: int) -> LayerMetric:
        """Metric of one layer; its power is that of the tokens of `rows`."""
        self.ensure_metric()
        stored = self._run.work.require([self.metric_stages[layer]])[0].tensors
        return LayerMetric(stored["form"], stored["power"][ordinary(self._stored_rows(layer).rms)])

    def _stored_rows(self, layer: int) -> LayerRows:
        self.ensure_rows()
        return LayerRows(**self._run.work.require([self.rows_stages[layer]])[0].tensors)
