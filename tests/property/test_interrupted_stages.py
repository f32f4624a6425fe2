"""However often and wherever a run is killed, what it leaves in the end is what a run that was not killed leaves."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_runtime.refactor import stages
from prism_runtime.refactor.stages import Output, Stage, WorkFolder, seed_of

LAYERS, EXPERTS = 2, 3
STEPS_OF_AN_OUTPUT = 5
"""Before and halfway through the file, before the flush, before the rename, after it."""


class Killed(BaseException):
    """Not an Exception, so that nothing of the code under test cleans up: neither does SIGKILL let it."""


def run(folder: Path) -> float:
    """A small computation of the recipe's form: tasks of (layer, expert), then a sum over each layer, then a total."""
    work = WorkFolder(folder)
    totals = []
    for layer in range(LAYERS):
        tasks = [Stage.of(f"task-{layer}-{expert}", {"seed": 7}) for expert in range(EXPERTS)]
        parts = [work.run(task, partial(draw, layer, expert)).tensors["x"] for expert, task in enumerate(tasks)]
        total = work.run(Stage.of(f"layer-{layer}", {}, *tasks), partial(add, parts))
        totals.append(total.tensors["sum"])
    return float(torch.stack(totals).sum())


def draw(layer: int, expert: int) -> Output:
    generator = torch.Generator().manual_seed(seed_of(7, layer, expert))
    return Output({"x": torch.randn(4, generator=generator)})


def add(parts: Sequence[Tensor]) -> Output:
    return Output({"sum": torch.stack(list(parts)).sum(0)}, {"experts": len(parts)})


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Kill at the given step; one that is never reached kills nothing."""
    left = steps

    def step() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    save, fsync, replace = stages.save_file, os.fsync, os.replace

    def slow_save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        step()
        path.write_bytes(b"half of a file")
        step()
        save(tensors, path, metadata)

    def slow_fsync(descriptor: int) -> None:
        step()
        fsync(descriptor)

    def slow_replace(source: Path, target: Path) -> None:
        step()
        replace(source, target)
        step()

    with (
        patch.object(stages, "save_file", slow_save),
        patch.object(os, "fsync", slow_fsync),
        patch.object(os, "replace", slow_replace),
    ):
        yield


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OUTPUTS = LAYERS * (EXPERTS + 1)


@settings(max_examples=60, deadline=None)
@given(kills=st.lists(st.integers(0, OUTPUTS * STEPS_OF_AN_OUTPUT), max_size=6))
def test_a_run_killed_at_any_points_resumes_to_the_bytes_of_one_that_was_not(kills: list[int]) -> None:
    with TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        expected = run(whole)
        for steps in kills:
            with suppress(Killed), killed_after(steps):
                run(broken)
        assert run(broken) == expected
        assert content(broken) == content(whole)


def test_a_run_is_killed_at_every_single_point() -> None:
    with TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        run(whole)
        for steps in range(OUTPUTS * STEPS_OF_AN_OUTPUT):
            broken = Path(scratch) / f"broken-{steps}"
            try:
                with killed_after(steps):
                    run(broken)
                raise AssertionError(f"step {steps} was never reached")
            except Killed:
                pass
            run(broken)
            assert content(broken) == content(whole), f"killed after {steps} steps"
