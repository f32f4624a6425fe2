"""Points that run the first sub-experts of each routed expert, as many as the rank that the router gave it deserves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_api import FULL
from prism_api.manifest import Divergence, MeasuredPoint
from prism_runtime.engine.model import load_pretrained
from prism_runtime.kernels.plan import PlanTables
from prism_runtime.refactor.artifact import write_sidecar
from prism_runtime.refactor.bytes import COUNTED_SEQUENCES, STEP_SIZES, touched_by_prefixes
from prism_runtime.refactor.calibration import Calibration
from prism_runtime.refactor.evaluate import PointQuality, evaluate_points
from prism_runtime.refactor.partition import Partition, Saliency, allocate_prefixes, rank_energy
from prism_runtime.refactor.pipeline import Finished, Run
from prism_runtime.refactor.progress import Advance
from prism_runtime.refactor.request import RecipeRefused
from prism_runtime.refactor.stages import Output, Stage
from prism_runtime.refactor.trace import PackedModel

SMALLEST_DEFAULT_POINT_PERMILLE = 250
"""Below a quarter a static choice of neurons is no longer a language model; ask for such a point by name."""
MOST_POINTS = 32
"""Bound of the manifest and of PrismModel."""


class PrefixPoints:
    """Measures the points of one run and writes what they need into an artifact."""

    def __init__(self, run: Run, calibration: Calibration, partition: Sequence[Stage]) -> None:
        """`partition` are the stages that made what `finish` is given."""
        self._run, self._calibration, self._partition = run, calibration, partition

    def finish(self, perms: Sequence[Tensor], checkpoint: Path) -> Finished:
        """Measure on the permuted `checkpoint`, what is shipped, and write its sidecar; points in manifest order."""
        shape, saliency = self._run.shape, self._calibration.saliency
        partitions = [
            Partition.of(perm, measured, shape.sub_experts) for perm, measured in zip(perms, saliency, strict=True)
        ]
        shares = prefix_counts(self._run.request.points_permille, shape.sub_experts)
        counts = allocate(shares, saliency, partitions, shape.top_k)
        quality = self._quality(checkpoint, counts)
        kept = strictly_rising(quality)
        touched = self._touched({permille: counts[permille] for permille in kept})
        by_layer = dict(zip(shape.moe_layers, partitions, strict=True))
        write_sidecar(checkpoint, by_layer, torch.stack([counts[permille] for permille in kept]))
        return Finished(
            [_measured_point(permille, quality[permille], touched[permille]) for permille in kept],
            {"kind": "none", "selection": "prefix", "allocation": "rank"},
        )

    def _quality(self, checkpoint: Path, counts: Mapping[int, Tensor]) -> dict[int, PointQuality]:
        work = self._run.work
        stages = {
            permille: Stage.of(f"quality-{permille}", {"counts": count.tolist()}, self._run.root, *self._partition)
            for permille, count in counts.items()
        }
        done = {permille: work.find(stage) for permille, stage in stages.items()}
        if missing := [permille for permille, output in done.items() if output is None]:
            tables = PlanTables.prefix(torch.stack(list(counts.values())), self._run.shape.sub_experts)
            packed = PackedModel(load_pretrained(checkpoint)[0], tables)
            total = len(missing) * len(self._run.texts.evaluation)
            with self._run.reporter.bar("evaluate", total, "sequences") as advance:
                for permille in missing:
                    task = partial(self._evaluate, packed, list(counts).index(permille), len(counts) - 1, advance)
                    done[permille] = work.run(stages[permille], task)
        return {permille: _quality_of(output.facts) for permille, output in done.items() if output is not None}

    def _touched(self, counts: Mapping[int, Tensor]) -> dict[int, dict[str, float]]:
        """For each budget: share of the weight bytes that a step reads, by its number of tokens."""
        asked = {str(permille): count.tolist() for permille, count in counts.items()}
        parameters = {"counts": asked, "sizes": list(STEP_SIZES), "sequences": COUNTED_SEQUENCES}
        facts = self._run.work.run(Stage.of("bytes", parameters, self._run.root), partial(self._count, counts)).facts
        return {permille: facts[str(permille)] for permille in counts}

    def _count(self, counts: Mapping[int, Tensor]) -> Output:
        run = self._run
        found = touched_by_prefixes(run.model, run.texts.evaluation, counts, run.shape.sub_experts)
        return Output(
            facts={
                str(permille): {str(size): round(share, 4) for size, share in shares.items()}
                for permille, shares in found.items()
            }
        )

    def _evaluate(self, packed: PackedModel, point: int, full: int, advance: Advance) -> Output:
        quality = evaluate_points(packed, self._run.texts.evaluation, [point], full, advance)[point]
        return Output(facts=asdict(quality) | {"kl": quality.kl.to_wire()})


def allocate(
    shares: Mapping[int, int], saliency: Sequence[Saliency], partitions: Sequence[Partition], top_k: int
) -> dict[int, Tensor]:
    """Budget in per-mille -> prefix counts [L, K]: each layer spends its sub-experts on the router's ranks by energy.

    shares  budget in per-mille -> sub-experts per routed expert, on average over ranks
    """
    energies = [rank_energy(measured, cut) for measured, cut in zip(saliency, partitions, strict=True)]
    return {
        permille: torch.tensor([allocate_prefixes(energy, share * top_k) for energy in energies], dtype=torch.int32)
        for permille, share in shares.items()
    }


def prefix_counts(points_permille: Sequence[int] | None, sub_experts: int) -> dict[int, int]:
    """Budget in per-mille -> sub-experts per routed expert, ascending and with 1000. Raises RecipeRefused for a budget
    that is not a multiple of one sub-expert."""
    possible = {round(1000 * count / sub_experts): count for count in range(1, sub_experts + 1)}
    smallest = SMALLEST_DEFAULT_POINT_PERMILLE
    asked = {p for p in possible if p >= smallest} if points_permille is None else {*points_permille, 1000}
    if impossible := sorted(asked - set(possible)):
        raise RecipeRefused(
            f"budgets {impossible} are no multiples of one of {sub_experts} sub-experts; possible: {sorted(possible)}"
        )
    if len(asked) > MOST_POINTS:
        raise RecipeRefused(
            f"{sub_experts} sub-experts give {len(asked)} points, a ladder holds {MOST_POINTS}; use --points"
        )
    return {permille: possible[permille] for permille in sorted(asked)}


def strictly_rising(quality: Mapping[int, PointQuality]) -> list[int]:
    """The budgets whose lower quality bound is below that of every larger one kept; ascending, 1000 always last."""
    kept: list[int] = []
    for permille in sorted(quality, reverse=True):
        if permille == 1000 or quality[permille].relative_quality_low < quality[kept[-1]].relative_quality_low:
            kept.append(permille)
    return kept[::-1]


def _quality_of(facts: Mapping[str, Any]) -> PointQuality:
    return PointQuality(**{**facts, "kl": Divergence.model_validate(facts["kl"])})


def _measured_point(permille: int, quality: PointQuality, touched: Mapping[str, float]) -> MeasuredPoint:
    return MeasuredPoint(
        name=FULL if permille == 1000 else f"b{permille}",
        budget_permille=permille,
        policy="full" if permille == 1000 else "rank",
        relative_quality=quality.relative_quality,
        relative_quality_low=quality.relative_quality_low,
        kl=quality.kl,
        same_top1=quality.same_top1,
        realised_permille=quality.realised_permille,
        touched_bytes_share=dict(touched) if touched and permille != 1000 else None,
    )
