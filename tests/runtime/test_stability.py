"""Stable points: told from artifacts of several seeds on several texts, and recorded in the manifest."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from prism_api.manifest import MANIFEST_NAME, Manifest
from prism_runtime.__main__ import build_parser
from prism_runtime.refactor.artifact import Artifact, ArtifactRefused, open_artifact, write_manifest
from prism_runtime.refactor.recipe import refactor_model
from prism_runtime.refactor.request import RefactorRequest
from prism_runtime.refactor.stability import Stability, record, require_comparable
from tests.runtime.letters import write_source

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_source(tmp_path_factory.mktemp("source"))
    text, out = source.parent / "text.jsonl", source.parent / "first"
    request = RefactorRequest(source, calibration=text, policy="sorted", sub_experts=4, points_permille=(250, 500, 750))
    refactor_model(request, out)
    return out


def changed(artifact: Path, target: Path, *, seed: int, drop: str | None = None, name: str | None = None) -> Path:
    """A copy with another seed in its manifest, without one of its points, or of another model."""
    shutil.copytree(artifact, target)
    manifest = open_artifact(target).manifest
    points = [point for point in manifest.operating_points if point.name != drop]
    source = manifest.source.model_copy(update={"digest": "sha256:" + "0" * 64} if name else {})
    calibration = manifest.calibration.model_copy(update={"seeds": [seed]})
    update = {"calibration": calibration, "operating_points": points, "source": source}
    write_manifest(target, manifest.model_copy(update=update))
    return target


def run(*arguments: object) -> int:
    parsed = build_parser().parse_args(["evaluate", *map(str, arguments)])
    return int(parsed.run(parsed))


def test_points_that_keep_order_and_cost_in_every_run_are_recorded(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(first, tmp_path / "artifact"))
    others = [changed(first, tmp_path / f"seed-{seed}", seed=seed) for seed in (1, 2)]
    text = first.parent / "text.jsonl"
    options = ("--text", text, "--seeds", *others, "--record", "--no-baselines", "--sequences", "4", "--json")
    assert run(artifact, *options) == 0
    found = json.loads(capsys.readouterr().out)["stability"]
    assert (found["runs"], found["points"]) == (3, ["b250", "b500", "b750"])
    points = open_artifact(artifact).manifest.operating_points
    assert {point.name: point.stable for point in points} == {
        "full": True,
        **{name: name in found["stable"] for name in found["points"]},
    }
    assert len(found["stable"]) >= 2


def test_recording_changes_nothing_else(first: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(first, tmp_path / "artifact"))
    record(artifact, Stability(3, ["b500"], ["b250", "b500", "b750"]))
    before, after = (open_artifact(each).manifest for each in (first, artifact))
    assert [point.stable for point in after.operating_points] == [False, True, False, True]
    cleared = [point.model_copy(update={"stable": None}) for point in after.operating_points]
    assert after.model_copy(update={"operating_points": cleared}) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0}, "has a seed that was given before"),
        ({"seed": 1, "drop": "b500"}, r"lacks the points \['b500'\]: make it with --points 500"),
        ({"seed": 1, "name": "other"}, "is of another model or cut"),
    ],
)
def test_an_artifact_that_cannot_be_compared_is_refused_by_name(
    first: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = changed(first, tmp_path / "other", **change)  # type: ignore[arg-type]
    manifest = Manifest.model_validate_json((other / MANIFEST_NAME).read_bytes())
    with pytest.raises(ArtifactRefused, match=f"other' {message}"):
        require_comparable(open_artifact(first), [Artifact(other, manifest, {})], 3)


def test_too_few_runs_are_refused_with_what_to_add(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(first, tmp_path / "other", seed=1)
    assert run(first, "--text", first.parent / "text.jsonl", "--seeds", other, "--no-baselines") == 2
    assert "2 artifacts on 1 texts are 2: give more artifacts of other seeds" in capsys.readouterr().err


def test_recording_without_other_seeds_is_refused(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(first, "--text", first.parent / "text.jsonl", "--record") == 2
    assert "give artifacts with other seeds" in capsys.readouterr().err
