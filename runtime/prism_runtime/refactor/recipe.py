"""From a checkpoint and text to an elastic artifact: in one process, in shards, or after a kill where it was."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_api import FULL
from prism_api.manifest import Calibration, Manifest, MeasuredPoint, SourceModel
from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import (
    digest_of_weights,
    list_files,
    open_artifact,
    write_checkpoint,
    write_manifest,
    write_sidecar,
)
from prism_runtime.refactor.evaluate import PointQuality, evaluate_points
from prism_runtime.refactor.memory import memory_needed
from prism_runtime.refactor.partition import Partition, Saliency, allocate_prefixes, rank_energy
from prism_runtime.refactor.pipeline import Pipeline
from prism_runtime.refactor.progress import Reporter
from prism_runtime.refactor.request import (
    RecipeRefused,
    RefactorRequest,
    same_request,
    tools,
)
from prism_runtime.refactor.stages import Shard, WorkFolder
from prism_runtime.refactor.text import cut_sequences, read_documents
from prism_runtime.refactor.trace import PackedModel

SMALLEST_DEFAULT_POINT_PERMILLE = 250
"""Below a quarter a static choice of neurons is no longer a language model; ask for such a point by name."""
MOST_POINTS = 32
"""Bound of the manifest and of PrismModel."""


def refactor_model(
    request: RefactorRequest,
    out: Path,
    *,
    work: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Manifest:
    """Make the artifact that `request` describes in the new directory `out`.

    work    folder of finished stages; a run with the same request goes on from what is there. None takes `out` with
            `.work` added, and removes it unless it is killed
    resume  refuse to start from the beginning

    `out` appears complete or not at all. Raises RecipeRefused, TextRefused, UnsupportedModel, CheckpointRefused or
    WorkFolderRefused.
    """
    _require_new(out)
    folder = work or out.with_name(f"{out.name}.work")
    if resume:
        RefactorRequest.read(folder)
    try:
        manifest = _finish(_open(request, folder, reporter or Reporter()), request, out)
    except ValueError:
        if work is None:  # refused, not interrupted: no later run can use what is there
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if work is None:
        shutil.rmtree(folder)
    return manifest


def run_shard(request: RefactorRequest, work: Path, shard: Shard, reporter: Reporter | None = None) -> int:
    """Run one process's share of the partition tasks into the folder `work`; returns their number."""
    return _open(request, work, reporter or Reporter()).run_partition(shard)


def merge_shards(works: Sequence[Path], out: Path, reporter: Reporter | None = None) -> Manifest:
    """Make the artifact of which every shard has done its share: the bytes that one process would write.

    Stages that are left are run, into the first folder. Raises WorkFolderRefused if the folders belong to different
    runs, or a share is missing.
    """
    _require_new(out)
    request = same_request(works)
    pipeline = _open(request, works[0], reporter or Reporter(), works[1:])
    pipeline.require_partition()
    return _finish(pipeline, request, out)


def evaluate_artifact(directory: Path, text: Path, sequences_per_domain: int | None = None) -> dict[str, PointQuality]:
    """Quality of every operating point of an artifact on a text file. Raises ArtifactRefused or TextRefused."""
    artifact = open_artifact(directory)
    length = artifact.manifest.calibration.sequence_length
    model, tokenizer = load_pretrained(directory)
    sequences = cut_sequences(read_documents(text), tokenizer, length, sequences_per_domain)
    names = artifact.manifest.ladder.names
    with Reporter().bar("evaluate", len(sequences), "sequences") as advance:
        quality = evaluate_points(
            PackedModel(model, artifact.tables()), sequences, list(range(len(names))), names.index(FULL), advance
        )
    return {name: quality[index] for index, name in enumerate(names)}


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
    if sub_experts < 1:
        raise RecipeRefused(f"--sub-experts must be at least 1; found {sub_experts}")
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


def strictly_rising(quality: dict[int, PointQuality]) -> list[int]:
    """The budgets whose lower quality bound is below that of every larger one kept; ascending, 1000 always last."""
    kept: list[int] = []
    for permille in sorted(quality, reverse=True):
        if permille == 1000 or quality[permille].relative_quality_low < quality[kept[-1]].relative_quality_low:
            kept.append(permille)
    return kept[::-1]


def _open(request: RefactorRequest, folder: Path, reporter: Reporter, others: Sequence[Path] = ()) -> Pipeline:
    prefix_counts(request.points_permille, request.sub_experts)
    request.require_same(folder)
    reporter.state_memory(memory_needed(request.model))
    pipeline = Pipeline(request, WorkFolder(folder, others), reporter)
    request.write(folder)
    return pipeline


def _finish(pipeline: Pipeline, request: RefactorRequest, out: Path) -> Manifest:
    shares = prefix_counts(request.points_permille, request.sub_experts)
    partitions = pipeline.partitions()
    counts = allocate(shares, pipeline.saliency, list(partitions.values()), pipeline.shape.top_k)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()
        write_checkpoint(request.model, target, {layer: partition.perm for layer, partition in partitions.items()})
        quality = pipeline.quality(target, counts)
        kept = strictly_rising(quality)
        write_sidecar(target, partitions, torch.stack([counts[permille] for permille in kept]))
        manifest = Manifest(
            tools=tools(),
            source=SourceModel(
                name=request.model.resolve().name,
                architecture=pipeline.architecture,
                licence=request.licence,
                digest=digest_of_weights(request.model),
            ),
            shape=pipeline.shape,
            files=list_files(target),
            calibration=Calibration(
                texts=pipeline.texts.provenance, sequence_length=pipeline.texts.length, seeds=[request.seed]
            ),
            partition={"policy": request.policy, "objective": "energy", "order": "descending"},
            gate={"kind": "none", "selection": "prefix", "allocation": "rank"},
            operating_points=[_measured_point(permille, quality[permille]) for permille in kept],
        )
        write_manifest(target, manifest)
        shutil.move(target, out)
    return manifest


def _measured_point(permille: int, quality: PointQuality) -> MeasuredPoint:
    return MeasuredPoint(
        name=FULL if permille == 1000 else f"b{permille}",
        budget_permille=permille,
        policy="full" if permille == 1000 else "rank",
        relative_quality=quality.relative_quality,
        relative_quality_low=quality.relative_quality_low,
        kl=quality.kl,
        same_top1=quality.same_top1,
        realised_permille=quality.realised_permille,
    )


def _require_new(out: Path) -> None:
    if out.exists():
        raise RecipeRefused(f"'{out}' exists already; give a new directory for --out, or remove it")
