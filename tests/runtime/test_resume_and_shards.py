"""One artifact, byte for byte, however its making was stopped, restarted or divided."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from prism_runtime.__main__ import main
from prism_runtime.refactor.artifact import open_artifact
from prism_runtime.refactor.recipe import ShardProgress, merge_shards, refactor_model, run_shard
from prism_runtime.refactor.request import REQUEST_NAME, RefactorRequest
from prism_runtime.refactor.stages import Shard, WorkFolderRefused
from tests.runtime.letters import write_source

PASSES = {"random": 1, "prism": 4}
"""Of the policies tested: the one where every expert draws random numbers, and the whole recipe."""
OUTPUTS = {"random": 1 + 16 + 2 + 1, "prism": 2 + 2 + 1 + 16 + 1 + 16 + 2 + 1 + 2 + 1 + 1}
"""Saliency, partition, quality of two points, weight bytes of one; for the recipe also rows, metric, limits, centre,
gates, a point."""


@pytest.fixture(scope="module", params=PASSES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RefactorRequest:
    source = write_source(tmp_path_factory.mktemp("source"))
    return RefactorRequest(
        source, source.parent / "text.jsonl", policy=request.param, sub_experts=4, points_permille=(500,), seed=3
    )


@pytest.fixture(scope="module")
def expected(asked: RefactorRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes in one go."""
    out = tmp_path_factory.mktemp("expected") / "artifact"
    refactor_model(asked, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["artifact"]
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outputs(work: Path) -> set[str]:
    return {path.name for path in work.glob("[!.]*.safetensors")}


def run_shards(asked: RefactorRequest, works: Sequence[Path]) -> None:
    """Every shard into its folder, pass by pass, as a Job does that is applied once for each pass."""
    for number in range(PASSES[asked.policy]):
        if number:  # the next pass reads all of the one before
            for work in works:
                for other in set(works) - {work}:
                    for name in outputs(other):
                        shutil.copy(other / name, work / name)
        for index, work in enumerate(works):
            done = run_shard(asked, work, Shard(index, len(works)))
    assert done.pass_ == done.passes


class Killed(BaseException):
    """Not an Exception: nothing may clean up after it."""


def kill_after(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the run before its output number `outputs` gets its name."""
    replace, left = os.replace, outputs

    def replacing(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).suffix == ".safetensors":
            if left == 0:
                raise Killed
            left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_run_killed_after_any_stage_resumes_to_the_same_bytes(
    share: float,
    asked: RefactorRequest,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = round(share * (OUTPUTS[asked.policy] - 1))
    with monkeypatch.context() as patched:
        kill_after(finished, patched)
        with pytest.raises(Killed):
            refactor_model(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(outputs(tmp_path / "out.work")) == finished
    refactor_model(asked, tmp_path / "out", work=tmp_path / "out.work", resume=True)
    assert content(tmp_path / "out") == expected
    assert len(outputs(tmp_path / "out.work")) == OUTPUTS[asked.policy]


def test_a_resumed_run_calibrates_only_once(
    asked: RefactorRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_shard(asked, tmp_path / "work", Shard(0, 2))
    for name in ("calibrate", "capture", "measure_metric"):
        monkeypatch.setattr(f"prism_runtime.refactor.calibration.{name}", lambda *_: pytest.fail("calibrated again"))
    run_shard(asked, tmp_path / "work", Shard(1, 2))


def test_two_shards_in_one_folder_merge_to_the_bytes_of_one_process(
    asked: RefactorRequest, expected: dict[str, bytes], tmp_path: Path
) -> None:
    work, passes = tmp_path / "work", PASSES[asked.policy]
    alone = passes == 1
    first = [run_shard(asked, work, Shard(index, 2)) for index in (1, 0)]
    second = ShardProgress(8, min(2, passes), passes, "partition", mergeable=True)
    assert first == [ShardProgress(8, 1, passes, "partition", mergeable=alone), second]
    gates = run_shard(asked, work, Shard(1, 2))
    assert gates == (second if alone else ShardProgress(1, 3, 4, "gates", mergeable=True))
    merge_shards([work], tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_the_artifact_of_the_recipe_chooses_by_gates_and_keeps_its_budget(
    asked: RefactorRequest, tmp_path: Path
) -> None:
    manifest = refactor_model(asked, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    gated = asked.policy == "prism"
    assert len(artifact.gates()) == (len(manifest.shape.moe_layers) if gated else 0)
    half, full = manifest.operating_points
    assert (half.name, half.policy) == ("b500", "threshold" if gated else "rank")
    assert half.realised_permille == pytest.approx(500, abs=10)
    assert half.kl is not None
    assert half.kl.tokens == 12 * manifest.calibration.sequence_length
    assert full.relative_quality == 1 > half.relative_quality > 0
    assert full.touched_bytes_share is None
    assert half.touched_bytes_share is not None
    assert list(half.touched_bytes_share) == ["8"]  # twelve sequences are no step of 32 tokens
    assert 0.5 < half.touched_bytes_share["8"] <= 1


def test_gate_and_allocation_are_in_the_manifest_and_in_what_resumes(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    asked = RefactorRequest(
        source, tmp_path / "text.jsonl", sub_experts=4, points_permille=(500,), gate="prior", allocation="dp"
    )
    first = refactor_model(asked, tmp_path / "first", work=tmp_path / "work")
    assert (first.gate["fit"], first.gate["features"], first.gate["allocation"]) == ("prior", [], "dp")
    done = outputs(tmp_path / "work")
    assert any(name.startswith("losses") for name in done)
    refactor_model(asked, tmp_path / "second", work=tmp_path / "work", resume=True)
    assert content(tmp_path / "second") == content(tmp_path / "first")
    assert outputs(tmp_path / "work") == done
    with pytest.raises(WorkFolderRefused, match="gate"):
        refactor_model(replace(asked, gate="ridge"), tmp_path / "third", work=tmp_path / "work")


def test_three_shards_in_a_folder_each_merge_to_the_bytes_of_one_process(
    asked: RefactorRequest, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [tmp_path / f"work-{index}" for index in range(3)]
    run_shards(asked, works)
    for name in ("partition_layer", "fit_gate", "fit_budget", "evaluate_methods"):
        where = "partitioners" if name == "partition_layer" else "gated"
        refuse = f"{name}: the shards have done it"
        monkeypatch.setattr(f"prism_runtime.refactor.{where}.{name}", partial(pytest.fail, refuse))
    merge_shards(works, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_a_missing_share_is_refused_by_name_and_no_artifact_appears(asked: RefactorRequest, tmp_path: Path) -> None:
    run_shard(asked, tmp_path / "work", Shard(0, 2))
    with pytest.raises(WorkFolderRefused, match=r"8 of 16 outputs are in none of '.*work': partition-1-0\..* and more"):
        merge_shards([tmp_path / "work"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_share_counts_as_missing(asked: RefactorRequest, tmp_path: Path) -> None:
    run_shards(asked, [tmp_path / "work"])
    (damaged,) = (tmp_path / "work").glob("partition-1-2.*")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(WorkFolderRefused, match=r"1 of 16 outputs .*: partition-1-2\."):
        merge_shards([tmp_path / "work"], tmp_path / "out")


def test_shards_of_different_runs_are_refused_with_the_difference(asked: RefactorRequest, tmp_path: Path) -> None:
    run_shard(asked, tmp_path / "a", Shard(0, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    changed = json.loads((tmp_path / "b" / REQUEST_NAME).read_text()) | {"seed": 4}
    (tmp_path / "b" / REQUEST_NAME).write_text(json.dumps(changed))
    with pytest.raises(WorkFolderRefused, match="are shards of different runs: seed is 3 there, 4 here"):
        merge_shards([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_text_that_changed_since_the_shards_ran_makes_their_shares_missing(
    asked: RefactorRequest, tmp_path: Path
) -> None:
    text = Path(shutil.copy(asked.calibration, tmp_path / "text.jsonl"))
    request = RefactorRequest(asked.model, text, policy="random", sub_experts=4)
    run_shard(request, tmp_path / "work", Shard(0, 1))
    text.write_text(text.read_text().replace("d1", "d2"))
    with pytest.raises(WorkFolderRefused, match="16 of 16 outputs are in none of"):
        merge_shards([tmp_path / "work"], tmp_path / "out")


def test_a_work_folder_of_other_arguments_is_refused_and_kept(asked: RefactorRequest, tmp_path: Path) -> None:
    run_shard(asked, tmp_path / "work", Shard(0, 2))
    before = content(tmp_path / "work")
    other = RefactorRequest(asked.model, asked.calibration, policy="sorted", sub_experts=4)
    with pytest.raises(WorkFolderRefused, match=r"policy is \w+ there, sorted here; .* Give another --work"):
        refactor_model(other, tmp_path / "out", work=tmp_path / "work")
    assert content(tmp_path / "work") == before


def test_resume_without_anything_to_resume_is_refused(asked: RefactorRequest, tmp_path: Path) -> None:
    with pytest.raises(WorkFolderRefused, match=f"has no {REQUEST_NAME}"):
        refactor_model(asked, tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


def test_command_line_shards_and_merges(
    asked: RefactorRequest, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = str(tmp_path / "work"), str(tmp_path / "out")
    arguments = ["refactor", str(asked.model), "--calibration", str(asked.calibration), "--work", work]
    arguments += ["--policy", asked.policy, "--sub-experts", "4", "--points", "500", "--seed", "3"]
    assert [main([*arguments, "--shard", f"{index}/2"]) for index in (0, 1, 0)] == [0, 0, 0]
    assert main(["merge", work, "--out", out]) == 0
    printed = capsys.readouterr()
    passes = PASSES[asked.policy]
    assert f"shard 1 of 2: 8 tasks of pass {min(2, passes)} of {passes} (partition) are in '{work}'" in printed.out
    assert ("start this command again when they have finished" in printed.out) == (passes > 1)
    assert "MiB of memory: " in printed.err
    assert ("text of the compensation" in printed.err) == (asked.policy == "prism")
    assert content(tmp_path / "out") == expected


def test_command_line_refuses_a_shard_without_a_folder_and_a_run_without_an_output(
    asked: RefactorRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["refactor", str(asked.model), "--calibration", str(asked.calibration)]
    assert main([*arguments, "--shard", "0/2"]) == main(arguments) == 2
    errors = capsys.readouterr().err
    assert "give --work DIR" in errors
    assert "give --out DIR" in errors
