"""From a checkpoint and text to an elastic artifact, and the quality of an artifact on other text."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from prism_api import FULL
from prism_api.manifest import Calibration, CalibrationText, Manifest, MeasuredPoint, Shape, SourceModel
from prism_runtime.engine.experts_hook import experts_modules, fused_projections
from prism_runtime.engine.model import load_pretrained
from prism_runtime.kernels.plan import PlanTables
from prism_runtime.refactor.artifact import (
    digest_of_weights,
    list_files,
    open_artifact,
    write_checkpoint,
    write_manifest,
    write_sidecar,
)
from prism_runtime.refactor.calibrate import calibrate
from prism_runtime.refactor.evaluate import PointQuality, evaluate_points, require_spread
from prism_runtime.refactor.partition import (
    Partition,
    Saliency,
    allocate_prefixes,
    partition_by_energy,
    rank_energy,
)
from prism_runtime.refactor.text import TokenSequence, cut_sequences, hold_out, provenance, read_documents
from prism_runtime.refactor.trace import PackedModel

DEFAULT_SUB_EXPERTS = 8
SEQUENCE_LENGTH = 256
SEQUENCES_PER_DOMAIN = 64
"""Gives a standard error of 1 % of the KL at half budget on the embedded model, in minutes on one core."""
SMALLEST_DEFAULT_POINT_PERMILLE = 250
"""Below a quarter a static choice of neurons is no longer a language model; ask for such a point by name."""
MOST_POINTS = 32
"""Bound of the manifest and of PrismModel."""


class RecipeRefused(ValueError):
    """The arguments cannot make an artifact."""


@dataclass(frozen=True, slots=True)
class _Text:
    """Token sequences to calibrate on and to measure quality on, disjoint by document."""

    calibration: list[TokenSequence]
    evaluation: list[TokenSequence]


def refactor_model(
    source: Path,
    calibration: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    sub_experts: int = DEFAULT_SUB_EXPERTS,
    points_permille: Sequence[int] | None = None,
    licence: str = "unspecified",
) -> Manifest:
    """Make an artifact of the checkpoint `source` in the new directory `out`.

    evaluation       text for the points' quality; without it every fourth calibration document is held out for it
    points_permille  budgets to measure; None takes every multiple of 1/`sub_experts` from 250 up. A point whose quality
                     is not below that of every larger one is left out: the artifact's ladder is strictly monotone.

    The model is held in memory as float32. `out` appears complete or not at all. Raises RecipeRefused, TextRefused,
    UnsupportedModel or CheckpointRefused.
    """
    if out.exists():
        raise RecipeRefused(f"'{out}' exists already; give a new directory for --out, or remove it")
    if not (source / "config.json").is_file():
        raise RecipeRefused(f"'{source}' has no config.json; MODEL must be the folder of a Hugging Face checkpoint")
    shares = prefix_counts(points_permille, sub_experts)
    model, tokenizer = load_pretrained(source)
    shape = _shape(model, sub_experts)
    length = min(SEQUENCE_LENGTH, model.config.get_text_config().max_position_embeddings)
    text, texts = _read_text(calibration, evaluation, tokenizer, length)
    with _progress() as progress:
        task = progress.add_task("calibrate", total=len(text.calibration))
        saliency = calibrate(model, text.calibration, lambda n: progress.advance(task, n))
    partitions = {
        layer: partition_by_energy(measured, sub_experts)
        for layer, measured in zip(shape.moe_layers, saliency, strict=True)
    }

    counts = allocate(shares, saliency, list(partitions.values()), shape.top_k)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()
        write_checkpoint(source, target, {layer: partition.perm for layer, partition in partitions.items()})
        # Quality is measured on what is shipped: the permuted checkpoint, read back from disk.
        quality = measure(target, counts, shape, text.evaluation)
        kept = strictly_rising(quality)
        write_sidecar(target, partitions, torch.stack([counts[permille] for permille in kept]))
        manifest = Manifest(
            tools={package: version(package) for package in ("moe-prism", "torch", "transformers")},
            source=SourceModel(
                name=source.resolve().name,
                architecture=type(model).__name__,
                licence=licence,
                digest=digest_of_weights(source),
            ),
            shape=shape,
            files=list_files(target),
            calibration=Calibration(texts=texts, sequence_length=length, seeds=[0]),
            partition={"objective": "energy", "order": "descending"},
            gate={"kind": "none", "selection": "prefix", "allocation": "rank"},
            operating_points=[_measured_point(permille, quality[permille]) for permille in kept],
        )
        write_manifest(target, manifest)
        shutil.move(target, out)
    return manifest


def evaluate_artifact(directory: Path, text: Path, sequences_per_domain: int | None = None) -> dict[str, PointQuality]:
    """Quality of every operating point of an artifact on a text file. Raises ArtifactRefused or TextRefused."""
    artifact = open_artifact(directory)
    length = artifact.manifest.calibration.sequence_length
    model, tokenizer = load_pretrained(directory)
    sequences = cut_sequences(read_documents(text), tokenizer, length, sequences_per_domain)
    names = artifact.manifest.ladder.names
    with _progress() as progress:
        task = progress.add_task("evaluate", total=len(sequences))
        quality = evaluate_points(
            PackedModel(model, artifact.tables()),
            sequences,
            list(range(len(names))),
            names.index(FULL),
            lambda n: progress.advance(task, n),
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


def measure(
    checkpoint: Path, counts: dict[int, Tensor], shape: Shape, sequences: Sequence[TokenSequence]
) -> dict[int, PointQuality]:
    """Quality of the prefix budgets `counts` on a permuted checkpoint, by per-mille."""
    model, _ = load_pretrained(checkpoint)
    packed = PackedModel(model, PlanTables.prefix(torch.stack(list(counts.values())), shape.sub_experts))
    with _progress() as progress:
        task = progress.add_task("evaluate", total=len(sequences))
        indices = list(range(len(counts)))
        quality = evaluate_points(packed, sequences, indices, indices[-1], lambda n: progress.advance(task, n))
    return dict(zip(counts, quality.values(), strict=True))


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


def _read_text(
    calibration: Path, evaluation: Path | None, tokenizer: Any, length: int
) -> tuple[_Text, list[CalibrationText]]:
    documents = read_documents(calibration)
    if evaluation is None:
        found = len(documents)
        documents, held = hold_out(documents)
        if not held:
            raise RecipeRefused(
                f"'{calibration}' has {found} documents, too few to hold one out for the evaluation; "
                f"give longer text, or --evaluation FILE"
            )
    else:
        held = read_documents(evaluation)
    fit = cut_sequences(documents, tokenizer, length, SEQUENCES_PER_DOMAIN)
    measured = cut_sequences(held, tokenizer, length, SEQUENCES_PER_DOMAIN)
    require_spread([sequence.domain for sequence in measured])  # minutes before the evaluation would find out
    return _Text(fit, measured), provenance(calibration, documents, fit)


def _shape(model: PreTrainedModel, sub_experts: int) -> Shape:
    """What a manifest says about the model's MoE layers. Raises RecipeRefused if they cannot be cut evenly."""
    modules = experts_modules(model)
    experts, neurons, hidden = fused_projections(modules[0][1])[0].shape
    if neurons % sub_experts:
        raise RecipeRefused(f"{neurons} neurons an expert cannot be cut into {sub_experts} equal sub-experts")
    return Shape(
        moe_layers=[layer for layer, _ in modules],
        experts=experts,
        top_k=model.config.get_text_config().num_experts_per_tok,
        neurons=neurons,
        hidden=hidden,
        sub_experts=sub_experts,
        neurons_per_sub_expert=neurons // sub_experts,
        norm_topk_prob=_normalises_top_k(model),
    )


def _normalises_top_k(model: PreTrainedModel) -> bool:
    """Whether router weights sum to one; Mixtral and GPT-OSS always normalise and have no switch for it."""
    config = model.config.get_text_config()
    return bool(getattr(config, "norm_topk_prob", config.model_type in ("mixtral", "gpt_oss")))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sequences, left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
