"""The whole evaluation of an artifact on text, as one document that tables, pages and programs read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_api import FULL
from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import open_artifact
from prism_runtime.refactor.baselines import OracleGate, TopK
from prism_runtime.refactor.bootstrap import Interval, Resampling
from prism_runtime.refactor.bytes import Touching, against_experts, best_selection, interleave, measure_touching
from prism_runtime.refactor.evaluate import (
    Measurement,
    Subject,
    Watching,
    candidates_of,
    evaluate_methods,
    relative_quality,
)
from prism_runtime.refactor.masked import MaskedModel
from prism_runtime.refactor.points import count_points, kl_at
from prism_runtime.refactor.progress import Reporter
from prism_runtime.refactor.stability import measure_stability, require_comparable
from prism_runtime.refactor.subjects import (
    ARTIFACT,
    ORACLE,
    TOP_K,
    TOP_K_RENORMALISED,
    artifact_subjects,
    baseline_subjects,
    cut_of,
    paper_subjects,
    step_subjects,
)
from prism_runtime.refactor.text import TokenSequence, cut_sequences, read_documents

Json = dict[str, Any]

THRESHOLD_SEQUENCES = 24
"""Some 6,000 tokens put a threshold's realised share within about 1 % of the asked one."""
BYTE_SHARES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class AssessmentOptions:
    """sequences    most of a domain; None takes all
    calibration  text for static baselines; None leaves them out
    baselines    measure them at all
    step_tokens  sizes of decode batches whose touched bytes are measured; empty measures none
    others       artifacts of the same model with other seeds, to tell which points are stable; empty leaves that open
    """

    sequences: int | None = None
    calibration: Path | None = None
    baselines: bool = True
    step_tokens: Sequence[int] = ()
    others: Sequence[Path] = ()


def assess_artifact(directory: Path, texts: Sequence[Path], options: AssessmentOptions, reporter: Reporter) -> Json:
    """Measure every operating point of an artifact, and the baselines, on the text files.

    The numbers are of the float32 masked forward, which the kernels are held to elsewhere. Raises ArtifactRefused,
    TextRefused, or ValueError if a domain has one sequence only, a step more tokens than there are sequences, or
    stability too few runs.
    """
    artifact = open_artifact(directory)
    others = [open_artifact(other) for other in options.others]
    if others:
        require_comparable(artifact, others, len(texts))
    cut = cut_of(artifact)
    length = artifact.manifest.calibration.sequence_length
    model, tokenizer = load_pretrained(directory)

    def read(paths: Sequence[Path], most: int | None) -> list[TokenSequence]:
        return cut_sequences([each for path in paths for each in read_documents(path)], tokenizer, length, most)

    sequences = read(texts, options.sequences)
    resampling = Resampling([sequence.domain for sequence in sequences])
    known = None
    if options.baselines and options.calibration is not None:
        known = interleave(read([options.calibration], None))[: 4 * THRESHOLD_SEQUENCES]
    masked = MaskedModel(model)
    subjects = artifact_subjects(artifact)
    if options.baselines:
        held = interleave(sequences)[:THRESHOLD_SEQUENCES]
        with reporter.bar("set the baselines' thresholds", len(cut.budgets), "budgets") as advance:
            subjects += baseline_subjects(masked, cut, held, known, advance)
    watching = Watching(cut.layers, cut.sub_experts, OracleGate(ORACLE, cut.groups(), cut.sub_experts))
    with reporter.bar("evaluate", len(sequences), "sequences") as advance:
        rows = evaluate_methods(masked, sequences, [*subjects, _everything(cut.top_k)], watching, advance)
    touched: dict[int, list[Touching]] = {}
    for size in options.step_tokens:
        with reporter.bar(f"steps of {size} tokens", len(sequences), "sequences") as advance:
            touched[size] = measure_touching(masked, sequences, step_subjects(artifact, cut), size, advance)
    stability = None
    if others:
        each = [read([path], options.sequences) for path in texts]
        total = (1 + len(others)) * sum(map(len, each))
        with reporter.bar("the points of every seed", total, "sequences") as advance:
            stability = measure_stability(artifact, others, each, advance)
    if known is not None:
        with reporter.bar("the published method's partition", cut.layers * cut.experts, "experts") as advance:
            published = paper_subjects(masked, cut, known, advance)
        with reporter.bar("evaluate it", len(sequences), "sequences") as advance:
            rows += evaluate_methods(masked, sequences, published, advance=advance)
    return {
        "artifact": artifact.manifest.source.name,
        "texts": [path.name for path in texts],
        "sequences": len(sequences),
        "sequenceLength": length,
        "shape": artifact.manifest.shape.to_wire(),
        "rows": [_row(row, rows, resampling, sequences) for row in rows],
        "points": {
            family: points
            for family in dict.fromkeys(row.family for row in rows)
            if (points := _points([row for row in rows if row.family in (family, FULL)], sequences))
        },
        "stability": None if stability is None else asdict(stability),
        "steps": [_step(size, measured, interleave(sequences)) for size, measured in touched.items()],
    }


def _everything(top_k: int) -> Subject:
    """The masked model with nothing masked: what its summation order costs, and the full model's own perplexity."""
    return Subject(FULL, 1.0, TopK(top_k))


def _row(
    row: Measurement, rows: Sequence[Measurement], resampling: Resampling, sequences: Sequence[TokenSequence]
) -> Json:
    domains = [sequence.domain for sequence in sequences]
    quality, low = relative_quality(row.kl.tolist(), domains)
    loss = resampling.mean(row.cross_entropy)
    return {
        "family": row.family,
        "name": row.name,
        "nominalPermille": round(1000 * row.nominal),
        "realisedPermille": round(1000 * row.realised, 1),
        "relativeQuality": str(quality),
        "relativeQualityLow": str(low),
        "kl": _interval(resampling.mean(row.kl)) | {"median": row.median, "p99": row.p99, "max": row.largest},
        "klByDomain": {name: float(row.kl[np.array(domains) == name].mean()) for name in dict.fromkeys(domains)},
        "crossEntropy": _interval(loss),
        "perplexity": float(np.exp(loss.value)),
        "sameTop1": resampling.mean(row.same_top1).value,
        "flips": {"lost": resampling.mean(row.lost).value, "gained": resampling.mean(row.gained).value},
        "topKOver": _against_top_k(row, rows, resampling),
        "realisedByLayer": row.realised_by_layer,
        "errorByLayer": {
            "sparse": row.sparse.error if row.sparse else None,
            "dense": row.dense.error if row.dense else None,
        },
        "energyByLayer": {
            "captured": row.sparse.captured if row.sparse else None,
            "capturable": row.sparse.capturable if row.sparse else None,
        },
        "usageByDomain": row.sparse.usage if row.sparse else {},
        "klBySequence": row.kl.tolist(),
    }


def _against_top_k(row: Measurement, rows: Sequence[Measurement], resampling: Resampling) -> Json | None:
    """KL of the better plain top-k at this row's realised budget, divided by the row's; None outside of top-k's range.

    Between two whole numbers of experts, linear in log KL of each sequence.
    """
    if row.family != ARTIFACT or not row.kl.any():
        return None
    candidates = []
    for family in (TOP_K, TOP_K_RENORMALISED):
        curve = [each for each in rows if each.family == family]
        if curve:
            cost, kl = np.array([each.realised for each in curve]), np.array([each.kl for each in curve])
            at = kl_at(cost, kl, row.realised)
            if at is not None:
                candidates.append(at)
    if not candidates:
        return None
    better = min(candidates, key=lambda kl: resampling.mean(kl).value)
    return _interval(resampling.ratio(better, row.kl))


def _points(rows: Sequence[Measurement], sequences: Sequence[TokenSequence]) -> Json | None:
    """How many of a family's budgets, the full model among them, one run tells apart; None for the full model alone."""
    if len(rows) < 2:
        return None
    counted = count_points(candidates_of(rows), [sequence.domain for sequence in sequences])
    return {
        "candidates": len(rows),
        "hull": [rows[index].name for index in counted.hull],
        "distinct": [rows[index].name for index in counted.distinct],
        "rises": counted.rises,
        "largestRise": counted.largest_rise,
        "monotoneKl": counted.monotone_kl.tolist(),
    }


def _step(size: int, measured: Sequence[Touching], mixed: Sequence[TokenSequence]) -> Json:
    best = {share: best_selection(measured, share) for share in BYTE_SHARES}
    return {
        "stepTokens": size,
        "points": [
            {"selection": each.selection, "name": each.name, "touchedShare": each.share, "kl": float(each.kl.mean())}
            for each in measured
        ],
        "atShare": [
            {"touchedShare": share, "kl": {selection: float(kl.mean()) for selection, kl in found.items()}}
            for share, found in best.items()
        ],
        "topKOver": {
            name: {selection: _interval(ratio) for selection, ratio in found.items()}
            for name, found in against_experts(measured, [each.domain for each in mixed[: len(measured[0].kl)]]).items()
        },
    }


def _interval(interval: Interval) -> Json:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
