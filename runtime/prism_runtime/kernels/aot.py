"""Compiles the Triton programs for GPUs that this machine does not have, and reads what the assembler says of them.

    python -m prism_runtime.kernels.aot                  a table: registers, spills, shared memory, occupancy, MMA
    python -m prism_runtime.kernels.aot --check FILE     fails where a gated target is worse than the table in FILE
    python -m prism_runtime.kernels.aot --write FILE

A compiled program says nothing about time, but much about why it would be slow: spilled registers, too much shared
memory for two blocks on a multiprocessor, no tensor cores.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prism_runtime.kernels.activations import SILU
from prism_runtime.kernels.triton_choice import choose_cells, compensation_inner
from prism_runtime.kernels.triton_experts import combine, sub_expert_down, sub_expert_up
from prism_runtime.kernels.triton_moe import DECODE, PREFILL, PREFILL_ATOMIC, Tiling
from prism_runtime.kernels.triton_routing import place_slots

INTEGER, BYTE = "*i32", "*i8"
LAYER = {"K": 8, "N": 4, "H": 2048, "D": 256}
"""OLMoE's: 1,024 neurons an expert in four sub-experts."""
EXPERTS = 64

REGISTERS_OF_MULTIPROCESSOR, THREADS_OF_WARP = 65536, 32
SHARED_OF_MULTIPROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes; CUDA C++ Programming Guide, technical specifications per compute capability."""

MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}
GATED = (80, 90, 100)


RANK = 4
"""Of the compensation."""


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One program as one kind of forward launches it.

    pointers    name and type of every tensor among its arguments
    scalars     name and type of arguments that are numbers
    """

    name: str
    program: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    scalars: Mapping[str, str] = field(default_factory=dict)


def products(phase: str, how: Tiling) -> Iterator[Variant]:
    """The two products as `how` cuts them."""
    tables = dict.fromkeys(("slot", "block_of", "start", "end"), INTEGER) | {"keep": BYTE}
    common = LAYER | {"BY_SLOT": how.by_slot, "UPCAST": False, "ROWS": how.rows}
    yield Variant(
        f"up.{phase}",
        sub_expert_up,
        dict.fromkeys(("hidden", "w1", "b1", "activated"), "*bf16") | tables,
        common | {"BIAS": False, "ACTIVATION": SILU, "NEURONS": how.up.width, "DEPTH": how.up.depth},
        how.up.options,
    )
    yield Variant(
        f"down.{phase}",
        sub_expert_down,
        {"activated": "*bf16", "w2": "*bf16", "router_weights": "*fp32", "out": "*fp32"} | tables,
        common | {"COLUMNS": how.down.width, "DEPTH": how.down.depth, "CELLS": LAYER["N"]},
        how.down.options,
    )


def _others() -> Iterator[Variant]:
    routing = {"expert_ids": "*i64", "router_weights": "*fp32", "keep": BYTE}
    plan = dict.fromkeys(("row_class", "class_point", "mode", "count", "index", "ranks", "outputs"), INTEGER)
    plan |= {"tau": "*fp32", "shift": "*fp32", "ran": "*i64", "routed": "*i64", "extra": "*fp64", "spent": "*fp64"}
    fitted = ("residual_rms", "gate", "bias", "mean", "deviation", "token", "a", "c", "u", "inner")
    pointers = {"hidden": "*bf16", "summed": "*fp32", "b2": "*bf16", "out": "*bf16"} | routing | plan
    pointers |= dict.fromkeys(fitted, "*fp32") | dict.fromkeys(("slot", "expert", "start", "end"), INTEGER)
    sizes = LAYER | {"E": EXPERTS, "SLOTS": 8, "CELLS": LAYER["N"], "RANK": RANK}
    gated = dict.fromkeys(("GATED", "TOKEN", "ADAPTIVE", "PLANNED", "COMPENSATED", "BY_SLOT"), True)
    yield Variant(
        "choose",
        choose_cells,
        pointers,
        sizes | gated | {"L": 16, "R": 1, "DEPTH": 2048},
        SMALL | {"num_warps": 8},
        {"layer": "i32", "kappa": "fp32"},
    )
    yield Variant(
        "compensate", compensation_inner, pointers, sizes | {"R": RANK, "DEPTH": 2048}, SMALL | {"num_warps": 8}
    )
    yield Variant(
        "place",
        place_slots,
        pointers,
        sizes | {"S": 256, "ROWS": DECODE.rows, "DENSE": True, "HERE": 16, "STEP": 64},
        SMALL,
    )
    yield Variant(
        "combine",
        combine,
        pointers,
        sizes | gated | {"R": RANK, "BIAS": True, "TILES": 1, "COUNTS": 8, "COLUMNS": 256},
        SMALL,
    )


SMALL: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
VARIANTS = (
    *products("decode", DECODE),
    *products("prefill", PREFILL),
    *products("prefill_atomic", PREFILL_ATOMIC),
    *_others(),
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled program takes.

    registers   a thread
    spilled     bytes a thread of local memory
    shared      bytes a block
    blocks      that fit on a multiprocessor by registers and shared memory
    mma         tensor-core instruction, or "none"
    """

    registers: int
    spilled: int
    shared: int
    blocks: int
    mma: str


def compile_variant(variant: Variant, capability: int) -> Usage:
    """Compile for an NVIDIA GPU of this compute capability (80 for 8.0)."""
    compiled = triton.compile(_source(variant), target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    registers, spilled = _resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (registers * THREADS_OF_WARP * variant.options["num_warps"])
    by_shared = SHARED_OF_MULTIPROCESSOR[capability] // max(shared, 1)
    mma = next((name for text, name in MMA.items() if text in compiled.asm["ptx"]), "none")
    return Usage(registers, spilled, shared, min(by_registers, by_shared), mma)


def compiles_for_amd(variant: Variant, architecture: str = "gfx942") -> bool:
    """Whether the program compiles for an AMD GPU; nothing more is known without the vendor's tools."""
    compiled = triton.compile(
        _source(variant),
        target=GPUTarget("hip", architecture, 64),
        options={**variant.options, "num_stages": 2},
    )
    return "hsaco" in compiled.asm


def _source(variant: Variant) -> Any:
    names = variant.program.arg_names
    pointers = {name: variant.pointers[name] for name in names if name in variant.pointers}
    signature = {name: pointers.get(name, variant.scalars.get(name, "constexpr")) for name in names}
    constants = {name: variant.constants[name] for name in names if signature[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
    return ASTSource(fn=variant.program, signature=signature, constexprs=constants, attrs=aligned)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, spilled bytes a thread) as the cubin records them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage told no registers; it said: {said.strip()[:200]}")
    return int(found[1]), int(found[2])


def table(capabilities: Sequence[int] = GATED) -> dict[str, dict[str, Usage]]:
    """Usage by target ("sm_80") and variant name."""
    return {
        f"sm_{capability}": {variant.name: compile_variant(variant, capability) for variant in VARIANTS}
        for capability in capabilities
    }


def worse(found: Mapping[str, Mapping[str, Usage]], held: Mapping[str, Mapping[str, Usage]]) -> Iterator[str]:
    """Every way in which `found` is worse than the table it is held to."""
    for target, variants in held.items():
        for name, was in variants.items():
            now = found.get(target, {}).get(name)
            if now is None:
                yield f"{target} {name}: not compiled any more; write the table again if that is meant"
                continue
            if now.spilled > was.spilled:
                yield f"{target} {name}: {now.spilled} bytes spilled a thread, held to {was.spilled}"
            if now.blocks < was.blocks:
                yield (
                    f"{target} {name}: {now.blocks} blocks fit on a multiprocessor ({now.registers} registers, "
                    f"{now.shared} bytes shared), held to {was.blocks}"
                )
            if now.mma != was.mma:
                yield f"{target} {name}: uses {now.mma}, held to {was.mma}"


def read(path: Path) -> dict[str, dict[str, Usage]]:
    document = json.loads(path.read_text())
    return {target: {name: Usage(**usage) for name, usage in rows.items()} for target, rows in document.items()}


def write(path: Path, found: Mapping[str, Mapping[str, Usage]]) -> None:
    document = {target: {name: asdict(usage) for name, usage in rows.items()} for target, rows in found.items()}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m prism_runtime.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail where a target is worse than this table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table")
    arguments = parser.parse_args()
    found = table()
    for target, rows in found.items():
        for name, usage in rows.items():
            print(
                f"{target:7} {name:20} {usage.registers:4} registers {usage.spilled:4} spilled "
                f"{usage.shared / 1024:6.0f} KiB shared {usage.blocks:2} blocks  {usage.mma}"
            )
    for variant in VARIANTS:
        print(f"gfx942  {variant.name:20} {'compiles' if compiles_for_amd(variant) else 'does not compile'}")
    if arguments.write:
        write(arguments.write, found)
    problems = list(worse(found, read(arguments.check))) if arguments.check else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
