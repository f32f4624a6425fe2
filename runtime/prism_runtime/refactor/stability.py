"""Whether an artifact's operating points keep their place if calibration had drawn otherwise, or on another text.

Artifacts of the same model and recipe that differ in their seed are measured on every text; each pair of an artifact
and a text is a run of `points.stable`. What is found can be recorded in the manifest, whose digest then changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prism_api import FULL
from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import Artifact, ArtifactRefused, open_artifact, write_manifest
from prism_runtime.refactor.evaluate import evaluate_methods, require_spread, run_of
from prism_runtime.refactor.masked import MaskedModel
from prism_runtime.refactor.points import RUNS_FOR_STABILITY, Run, stable
from prism_runtime.refactor.progress import Advance
from prism_runtime.refactor.subjects import artifact_subjects
from prism_runtime.refactor.text import TokenSequence


@dataclass(frozen=True, slots=True)
class Stability:
    """runs    artifacts times texts
    stable  names of the points whose order and cost hold in all of them, in ladder order
    points  names of all points but `full`, in ladder order
    """

    runs: int
    stable: list[str]
    points: list[str]


def require_comparable(artifact: Artifact, others: Sequence[Artifact], texts: int) -> None:
    """Raises ArtifactRefused that names an artifact of another model, cut or ladder, or of the same seed as another;
    ValueError if they give too few runs.
    """
    own = artifact.manifest
    budgets = {point.name: point.budget_permille for point in own.operating_points}
    seeds = [own.calibration.seeds]
    for other in others:
        found = other.manifest
        if found.source.digest != own.source.digest or found.shape != own.shape:
            raise ArtifactRefused(
                f"'{other.directory}' is of another model or cut than '{artifact.directory}': make it from the same "
                f"checkpoint with the same --sub-experts"
            )
        if missing := sorted(budgets.keys() - {point.name for point in found.operating_points}):
            wanted = ",".join(str(permille) for name, permille in budgets.items() if name in missing)
            raise ArtifactRefused(f"'{other.directory}' lacks the points {missing}: make it with --points {wanted}")
        if found.calibration.seeds in seeds:
            raise ArtifactRefused(f"'{other.directory}' has a seed that was given before, {found.calibration.seeds}")
        seeds.append(found.calibration.seeds)
    if len(seeds) * texts < RUNS_FOR_STABILITY:
        raise ValueError(
            f"stability needs {RUNS_FOR_STABILITY} runs, an artifact on a text each; {len(seeds)} artifacts on {texts} "
            f"texts are {len(seeds) * texts}: give more artifacts of other seeds, or more text files"
        )


def measure_stability(
    artifact: Artifact, others: Sequence[Artifact], texts: Sequence[Sequence[TokenSequence]], advance: Advance
) -> Stability:
    """Measure every artifact's points on every text; `advance` is told finished sequences. Raises as
    `require_comparable` and, for a domain of one sequence, `require_spread` do.
    """
    require_comparable(artifact, others, len(texts))
    for text in texts:
        require_spread([sequence.domain for sequence in text])
    names = [name for name in artifact.manifest.ladder.names if name != FULL]
    runs = [run for each in (artifact, *others) for run in _runs(each, names, texts, advance)]
    nominal = np.array([artifact.manifest.ladder[name].budget_permille / 1000 for name in names])
    kept = stable(nominal, range(len(names)), runs)
    return Stability(len(runs), [names[index] for index in kept], names)


def record(directory: Path, found: Stability) -> None:
    """Write into the artifact's manifest which of its points are stable; `full`, which is exact, is."""
    manifest = open_artifact(directory).manifest
    points = [
        point.model_copy(update={"stable": point.name == FULL or point.name in found.stable})
        for point in manifest.operating_points
    ]
    write_manifest(directory, manifest.model_copy(update={"operating_points": points}))


def _runs(
    artifact: Artifact, names: Sequence[str], texts: Sequence[Sequence[TokenSequence]], advance: Advance
) -> list[Run]:
    """One a text: the named points' realised budgets and KL, in their order."""
    masked = MaskedModel(load_pretrained(artifact.directory)[0])
    by_name = {subject.method.name: subject for subject in artifact_subjects(artifact)}
    subjects = [by_name[name] for name in names]
    return [
        run_of(evaluate_methods(masked, text, subjects, advance=advance), [sequence.domain for sequence in text])
        for text in texts
    ]
