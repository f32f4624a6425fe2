"""A work folder keeps what is finished, and notices what is damaged, foreign or missing."""

import os
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_runtime.refactor.stages import Output, Shard, Stage, WorkFolder, WorkFolderRefused, seed_of

STAGE = Stage.of("gates-0", {"lam": 1e-3})
OUTPUT = Output({"weight": torch.arange(6.0).reshape(2, 3).T}, {"score": 0.1, "by": {"1": [2]}})


def not_run() -> Output:
    raise AssertionError("the stage was run again")


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    WorkFolder(tmp_path).run(STAGE, lambda: OUTPUT)
    found = WorkFolder(tmp_path).run(STAGE, not_run)
    assert torch.equal(found.tensors["weight"], OUTPUT.tensors["weight"])
    assert found.facts == OUTPUT.facts


def test_a_run_sees_the_memory_layout_that_a_restarted_run_sees(tmp_path: Path) -> None:
    assert not OUTPUT.tensors["weight"].is_contiguous()
    first = WorkFolder(tmp_path).run(STAGE, lambda: OUTPUT).tensors["weight"]
    again = WorkFolder(tmp_path).run(STAGE, not_run).tensors["weight"]
    assert first.stride() == again.stride() == (2, 1)


def test_an_output_without_tensors_is_kept(tmp_path: Path) -> None:
    WorkFolder(tmp_path).run(STAGE, lambda: Output(facts={"kl": 0.25}))
    assert WorkFolder(tmp_path).run(STAGE, not_run).facts == {"kl": 0.25}


@pytest.mark.parametrize(
    "changed",
    [
        Stage.of("gates-1", {"lam": 1e-3}),
        Stage.of("gates-0", {"lam": 1e-2}),
        Stage.of("gates-0", {"lam": 1e-3}, STAGE),
    ],
    ids=["name", "parameter", "input"],
)
def test_a_stage_with_another_name_parameter_or_input_is_another_stage(changed: Stage, tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.run(STAGE, lambda: OUTPUT)
    assert folder.find(changed) is None


def test_the_order_of_parameters_does_not_matter() -> None:
    assert Stage.of("s", {"a": 1, "b": 2}) == Stage.of("s", {"b": 2, "a": 1})


def test_any_flipped_byte_makes_an_output_run_again_to_the_same_bytes(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.run(STAGE, lambda: OUTPUT)
    path = tmp_path / STAGE.file_name
    intact = path.read_bytes()
    for at in range(0, len(intact), 3):
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 0x41]) + intact[at + 1 :])
        folder.run(STAGE, lambda: OUTPUT)
        assert path.read_bytes() == intact, f"byte {at}"


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_output_counts_as_missing(size: int, tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.run(STAGE, lambda: OUTPUT)
    path = tmp_path / STAGE.file_name
    path.write_bytes(path.read_bytes()[:size])
    assert folder.find(STAGE) is None


def test_a_foreign_file_under_the_name_of_an_output_counts_as_missing(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / STAGE.file_name)
    assert WorkFolder(tmp_path).find(STAGE) is None


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / f".{STAGE.file_name}.killed").write_bytes(b"half")
    WorkFolder(tmp_path).run(STAGE, lambda: OUTPUT)
    assert [path.name for path in tmp_path.iterdir()] == [STAGE.file_name]


def test_two_writers_of_one_stage_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        WorkFolder(tmp_path).run(STAGE, lambda: OUTPUT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    found = WorkFolder(tmp_path).run(STAGE, lambda: OUTPUT)
    assert found.facts == OUTPUT.facts
    assert [path.name for path in tmp_path.iterdir()] == [STAGE.file_name]


def test_outputs_of_other_folders_are_read_and_left_there(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "a").run(STAGE, lambda: OUTPUT)
    both = WorkFolder(tmp_path / "b", [tmp_path / "a"])
    assert both.run(STAGE, not_run).facts == OUTPUT.facts
    assert not list((tmp_path / "b").iterdir())


def test_missing_outputs_are_refused_by_name(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.run(STAGE, lambda: OUTPUT)
    missing = Stage.of("gates-1", {})
    with pytest.raises(WorkFolderRefused, match=r"1 of 2 outputs are in none of .*: gates-1\.[0-9a-f]+\.safetensors\."):
        folder.require([STAGE, missing])
    folder.require([STAGE])


def test_a_file_as_work_folder_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFolderRefused, match="cannot be a work folder"):
        WorkFolder(tmp_path / "file")
    with pytest.raises(WorkFolderRefused, match="no such work folders"):
        WorkFolder(tmp_path, [tmp_path / "absent"])


def test_shards_cover_every_task_once_and_evenly() -> None:
    for count in (1, 2, 3, 7, 40):
        for tasks in (0, 1, 24, 25):
            shares = [list(Shard(index, count).share(tasks)) for index in range(count)]
            assert list(chain.from_iterable(shares)) == list(range(tasks))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_out_of_range_is_refused(index: int, count: int) -> None:
    with pytest.raises(WorkFolderRefused, match=f"found {index}/{count}"):
        Shard(index, count)


def test_seeds_differ_by_place_and_by_run() -> None:
    seeds = {seed_of(seed, layer, expert) for seed in (0, 1) for layer in range(4) for expert in range(16)}
    assert len(seeds) == 128
    assert all(0 <= seed < 2**63 for seed in seeds)
