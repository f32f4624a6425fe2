"""Points that a gate selects for: gates, thresholds, compensation and quality, each a stage."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prism_api import FULL
from prism_api.manifest import Divergence, MeasuredPoint
from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.refactor.allocation import LEVELS, SEQUENCES, LayerLosses, measure_losses, measured_text
from prism_runtime.refactor.artifact import write_sidecar
from prism_runtime.refactor.baselines import TopK
from prism_runtime.refactor.bootstrap import Resampling
from prism_runtime.refactor.bytes import COUNTED_SEQUENCES, STEP_SIZES, fixed_reads, touched_shares
from prism_runtime.refactor.calibration import Calibration
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.evaluate import Subject, clustered_mean, evaluate_methods, relative_quality
from prism_runtime.refactor.fit import FittedPoint, fit_budget
from prism_runtime.refactor.gates import fit_gate, kappa_of
from prism_runtime.refactor.method import Method
from prism_runtime.refactor.partition import Partition
from prism_runtime.refactor.pipeline import Finished, Pass, Run, Texts
from prism_runtime.refactor.points import Candidates, distinct, hull
from prism_runtime.refactor.progress import Advance
from prism_runtime.refactor.sidecar import GatedPoint, GatedRecipe
from prism_runtime.refactor.stages import Output, Shard, Stage

DEFAULT_POINTS_PERMILLE = tuple(range(250, 1000, 50))
"""Candidates; those that the hull and the bootstrap leave become points."""
FEATURES = {"ridge": ["x"], "pca": ["x"], "prior": []}
"""What a gate of each kind reads, as the manifest tells."""


class GatedPoints:
    """Fits and measures the points of one run, and writes what they need into an artifact."""

    def __init__(self, run: Run, calibration: Calibration, partition: Sequence[Stage]) -> None:
        """`partition` are the stages that made what `finish` is given."""
        self._run, self._calibration = run, calibration
        settings = calibration.settings
        gate = {"kind": settings.gate, "token_factor": settings.token_factor, "kappa": settings.kappa}
        self._layers = range(len(run.shape.moe_layers))
        self._gate_stages = [
            Stage.of(f"gate-{layer}", gate, *partition, calibration.metric_stages[layer]) for layer in self._layers
        ]
        asked = run.request.points_permille or DEFAULT_POINTS_PERMILLE
        self._budgets = sorted({permille for permille in asked if permille != 1000})
        fitted = {
            "allocation": settings.allocation,
            "compensation": settings.compensation,
            "rank": settings.rank,
            "rounds": settings.rounds,
            "fit_sequences": settings.fit_sequences,
        }
        self._losses_stage = Stage.of("losses", {"levels": LEVELS, "sequences": SEQUENCES}, *self._gate_stages)
        fitted_from = [*self._gate_stages, *calibration.metric_stages]
        if settings.allocation == "dp":
            fitted_from.append(self._losses_stage)
        self._point_stages = {
            permille: Stage.of(f"point-{permille}", fitted, *fitted_from) for permille in self._budgets
        }
        self._quality_stages = {
            permille: Stage.of(f"quality-{permille}", {}, run.root, stage)
            for permille, stage in self._point_stages.items()
        }
        self._quality_stages[1000] = Stage.of("quality-1000", {}, run.root, *self._gate_stages)

    def passes(self, perms: Callable[[], Sequence[Tensor]]) -> list[Pass]:
        """What shards may do after the partition, whose result `perms` reads: gates by layer, points by budget.

        Layers of one point are not divided: its threshold is one for all, and compensation is fitted from the first
        layer to the last, each on what the ones before it have left.
        """
        points = [*self._point_stages.values(), *self._quality_stages.values()]
        return [
            Pass("gates", self._gate_stages, partial(self._run_gates, perms)),
            Pass("points", points, partial(self._run_points, perms)),
        ]

    def _run_gates(self, perms: Callable[[], Sequence[Tensor]], shard: Shard) -> int:
        share = shard.share(len(self._layers))
        self._calibration.masked.permute(perms())
        with self._run.reporter.bar("gates", len(share), "layers") as advance:
            for layer in share:
                self._gate(layer, advance)
        return len(share)

    def _run_points(self, perms: Callable[[], Sequence[Tensor]], shard: Shard) -> int:
        budgets = sorted(self._quality_stages)
        share = [budgets[index] for index in shard.share(len(budgets))]
        self._calibration.masked.permute(perms())
        self._quality({permille: self._point(permille) if permille != 1000 else None for permille in share})
        return len(share)

    def finish(self, perms: Sequence[Tensor], checkpoint: Path) -> Finished:
        """Fit, measure, and write the sidecar beside the permuted `checkpoint`; points in manifest order."""
        self._calibration.masked.permute(perms)
        fitted = {permille: self._point(permille) for permille in self._budgets}
        measured = self._quality(fitted | {1000: None})
        kept = self._kept(measured)
        touched = self._touched({permille: fitted[permille] for permille in kept if permille != 1000})
        shape = self._run.shape
        partitions = {
            layer: Partition.of(perm, saliency, shape.sub_experts)
            for layer, perm, saliency in zip(shape.moe_layers, perms, self._calibration.saliency, strict=True)
        }
        counts = torch.full((len(kept), len(perms), shape.top_k), shape.sub_experts, dtype=torch.int32)
        points = {
            position: GatedPoint(fitted[permille].log_tau, compensation=fitted[permille].compensation)
            for position, permille in enumerate(kept)
            if permille != 1000
        }
        recipe = GatedRecipe(self._gates, points)
        write_sidecar(checkpoint, partitions, counts, recipe)
        settings = self._calibration.settings
        compensation = {"trajectory": settings.compensation, "rank": settings.rank} if settings.compensation else None
        return Finished(
            [
                _measured_point(
                    permille,
                    measured[permille],
                    measured[1000],
                    self._run.texts,
                    distinct=self._filtered,
                    touched=touched.get(permille),
                )
                for permille in kept
            ],
            recipe.manifest_entry(
                features=FEATURES[settings.gate],
                fit=settings.gate,
                allocation=settings.allocation,
                compensation=compensation,
            ),
        )

    @property
    def _filtered(self) -> bool:
        """Points that were asked for by name stay whether they are distinct or not."""
        return self._run.request.points_permille is None

    @cached_property
    def _gates(self) -> list[GateWeights]:
        with self._run.reporter.bar("gates", len(self._layers), "layers") as advance:
            return [self._gate(layer, advance) for layer in self._layers]

    def _gate(self, layer: int, advance: Advance) -> GateWeights:
        tensors = self._run.work.run(self._gate_stages[layer], partial(self._fit_gate, layer)).tensors
        advance(1)
        return GateWeights(
            weight=tensors["weight"],
            bias=tensors["bias"],
            mean=tensors["mean"],
            deviation=tensors["deviation"],
            token=tensors.get("token"),
            kappa=kappa_of(self._calibration.settings.gate, self._calibration.settings.kappa),
        )

    def _fit_gate(self, layer: int) -> Output:
        calibration = self._calibration
        gate = fit_gate(
            calibration.masked.experts[layer],
            calibration.rows[layer],
            calibration.forms[layer],
            self._run.shape.sub_experts,
            calibration.token_factor(layer),
            calibration.settings.kappa,
            calibration.settings.gate,
        )
        tensors = {"weight": gate.weight, "bias": gate.bias, "mean": gate.mean, "deviation": gate.deviation}
        return Output(tensors if gate.token is None else tensors | {"token": gate.token})

    def _point(self, permille: int) -> FittedPoint:
        tensors = self._run.work.run(self._point_stages[permille], partial(self._fit_point, permille)).tensors
        compensation = [
            CompensationWeights(*(tensors[f"{layer}.{name}"] for name in ("a", "u", "c")))
            for layer in self._layers
            if f"{layer}.a" in tensors
        ]
        return FittedPoint(tensors["log_tau"], compensation or None)

    def _fit_point(self, permille: int) -> Output:
        calibration, texts = self._calibration, self._run.texts
        self._run.reporter.say(f"fit thresholds and compensation of budget {permille}")
        method = fit_budget(
            calibration.masked,
            texts.calibration,
            texts.held,
            self._gates,
            calibration.forms,
            permille / 1000,
            calibration.settings,
            self._losses,
        )
        tensors = {"log_tau": method.log_tau}
        for layer, weights in enumerate(method.compensation or ()):
            tensors |= {f"{layer}.a": weights.a, f"{layer}.u": weights.u, f"{layer}.c": weights.c}
        return Output(tensors)

    @cached_property
    def _losses(self) -> LayerLosses | None:
        """What layers lose by running less; None where budgets do not ask."""
        if self._calibration.settings.allocation != "dp":
            return None
        tensors = self._run.work.run(self._losses_stage, self._measure_losses).tensors
        return LayerLosses(tensors["budget"].numpy(), tensors["loss"].numpy())

    def _measure_losses(self) -> Output:
        held = self._run.texts.held
        total = len(self._layers) * len(LEVELS) * len(measured_text(held))
        with self._run.reporter.bar("losses of layers", total, "sequences") as advance:
            found = measure_losses(self._calibration.masked, held, self._gates, advance)
        return Output({"budget": torch.from_numpy(found.budget), "loss": torch.from_numpy(found.loss)})

    def _quality(self, fitted: Mapping[int, FittedPoint | None]) -> dict[int, Output]:
        """Of points by their budget; None runs everything."""
        measured = {}
        with self._run.reporter.bar("evaluate", len(fitted) * len(self._run.texts.evaluation), "sequences") as advance:
            for permille, point in fitted.items():
                method: Method = TopK(self._run.shape.top_k)
                if point is not None:
                    method = ElasticMethod(self._gates, point.log_tau, point.compensation)
                evaluate = partial(self._evaluate, permille, method, advance)
                measured[permille] = self._run.work.run(self._quality_stages[permille], evaluate)
        return measured

    def _touched(self, points: Mapping[int, FittedPoint]) -> dict[int, dict[str, float]]:
        """For each budget: share of the weight bytes that a step reads, by its number of tokens."""
        parameters = {"sizes": list(STEP_SIZES), "sequences": COUNTED_SEQUENCES}
        found = {}
        with self._run.reporter.bar("count weight bytes", len(points), "points") as advance:
            for permille, point in points.items():
                stage = Stage.of(f"bytes-{permille}", parameters, self._run.root, self._point_stages[permille])
                found[permille] = dict(self._run.work.run(stage, partial(self._count_bytes, point)).facts)
                advance(1)
        return found

    def _count_bytes(self, point: FittedPoint) -> Output:
        method = ElasticMethod(self._gates, point.log_tau, point.compensation)
        shape, masked = self._run.shape, self._calibration.masked
        fixed = fixed_reads(method, shape.neurons, shape.hidden, shape.top_k)
        shares = touched_shares(masked, self._run.texts.evaluation, method, fixed)
        return Output(facts={str(size): round(share, 4) for size, share in shares.items()})

    def _evaluate(self, permille: int, method: Method, advance: Advance) -> Output:
        subject = Subject("prism", permille / 1000, method)
        (found,) = evaluate_methods(self._calibration.masked, self._run.texts.evaluation, [subject], advance=advance)
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(found, name)))
            for name in ("kl", "cross_entropy", "same_top1")
        }
        facts = {name: getattr(found, name) for name in ("median", "p99", "largest", "realised")}
        return Output(tensors, facts)

    def _kept(self, measured: Mapping[int, Output]) -> list[int]:
        """Budgets that become points, ascending: of candidates by default those on the hull and distinct."""
        order = sorted(measured)
        kl = np.stack([measured[permille].tensors["kl"].numpy() for permille in order])
        realised = np.array([_cost(permille, measured[permille]) for permille in order])
        domains = [sequence.domain for sequence in self._run.texts.evaluation]
        chain = list(range(len(order)))
        if self._filtered:
            resampling = Resampling(domains)
            chain = hull(realised, np.array([resampling.mean(values).value for values in kl]))
            candidates = Candidates(np.array(order) / 1000, realised, kl).take(chain)
            chain = [chain[index] for index in distinct(candidates, resampling)]
        kept: list[int] = [1000]
        low = relative_quality(kl[-1].tolist(), domains)[1]
        for index in reversed(chain):
            quality = relative_quality(kl[index].tolist(), domains)[1]
            if order[index] != 1000 and quality < low:
                kept.append(order[index])
                low = quality
        return kept[::-1]


def _cost(permille: int, measured: Output) -> float:
    """The full point is run without gates, so it costs what the model costs."""
    return 1.0 if permille == 1000 else float(measured.facts["realised"])


def _measured_point(
    permille: int,
    measured: Output,
    full: Output,
    texts: Texts,
    *,
    distinct: bool,
    touched: Mapping[str, float] | None,
) -> MeasuredPoint:
    domains = [sequence.domain for sequence in texts.evaluation]
    kl = measured.tensors["kl"].tolist()
    mean, standard_error, _ = clustered_mean(kl, domains)
    quality, low = relative_quality(kl, domains)
    facts, tensors = measured.facts, measured.tensors
    rise = tensors["cross_entropy"] - full.tensors["cross_entropy"]
    return MeasuredPoint(
        name=FULL if permille == 1000 else f"b{permille}",
        budget_permille=permille,
        policy="full" if permille == 1000 else "threshold",
        relative_quality=quality,
        relative_quality_low=low,
        kl=Divergence(
            mean=mean,
            standard_error=standard_error,
            p99=facts["p99"],
            tokens=len(kl) * texts.length,
            median=facts["median"],
            max=facts["largest"],
        ),
        same_top1=clustered_mean(tensors["same_top1"].tolist(), domains)[0],
        realised_permille=min(1000, round(1000 * _cost(permille, measured))),
        ce_delta=clustered_mean(rise.tolist(), domains)[0],
        touched_bytes_share=dict(touched) if touched else None,
        distinct=distinct or None,
    )
