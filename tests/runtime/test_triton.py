"""The Triton programs without a GPU: against the definition in the interpreter, and compiled for GPUs."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from prism_runtime.kernels import aot
from prism_runtime.kernels.activations import UnsupportedActivation, recognise
from prism_runtime.kernels.triton_moe import Tile, Tiling

HELD = Path(__file__).parent / "triton" / "aot.json"
INTERPRETED = Path(__file__).parent / "triton" / "interpreted.py"


def test_the_programs_compute_what_the_reference_does() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(INTERPRETED)]
    run = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_compiled_programs_are_no_worse_than_the_table_that_they_are_held_to() -> None:
    """The compiler's interface is private to Triton: `kernels/aot.py` is written for this version of it."""
    assert version("triton") == "3.9.0"
    held = aot.read(HELD)
    found = aot.table()
    assert set(found) == set(held)
    assert list(aot.worse(found, held)) == []
    assert all(usage.spilled == 0 for rows in found.values() for usage in rows.values())
    assert found["sm_90"]["up.prefill"].mma == "wgmma"
    assert found["sm_100"]["up.prefill"].mma == "tcgen05"


def test_a_program_that_spills_or_fits_fewer_blocks_or_leaves_the_tensor_cores_is_named() -> None:
    held = aot.read(HELD)
    target, name = "sm_80", "up.prefill"
    was = held[target][name]
    for changed in (
        replace(was, spilled=96),
        replace(was, blocks=was.blocks - 1),
        replace(was, mma="none"),
    ):
        found = held | {target: held[target] | {name: changed}}
        assert [problem.startswith(f"{target} {name}:") for problem in aot.worse(found, held)] == [True]


def test_a_tile_that_spills_is_found_by_the_compiler_and_named() -> None:
    """128 rows of 128 neurons and 4 warps: more accumulators than an sm_80 thread has registers."""
    wide = Tile(128, 64, 4, 3)
    (variant,) = [one for one in aot.products("prefill", Tiling(128, True, wide, wide)) if one.name == "up.prefill"]
    found = {"sm_80": {variant.name: aot.compile_variant(variant, 80)}}
    held = {"sm_80": {variant.name: aot.read(HELD)["sm_80"][variant.name]}}
    assert any("bytes spilled a thread, held to 0" in problem for problem in aot.worse(found, held))


@pytest.mark.parametrize("variant", aot.VARIANTS, ids=lambda variant: variant.name)
def test_the_programs_compile_for_amd(variant: aot.Variant) -> None:
    assert aot.compiles_for_amd(variant)


def test_an_activation_that_no_program_computes_is_refused() -> None:
    with pytest.raises(UnsupportedActivation, match="reference"):
        recognise(lambda gate, up: torch.nn.functional.gelu(gate) * up)
