"""Loads this package's C: as it was compiled beforehand, or compiled at first use; says no where there is neither.

A wheel of pure Python stays one wheel for every platform, and the code is compiled for the very processor it runs on.
Images have no compiler and do not know their processor: for them, before,

    python -m prism_runtime.native FOLDER        FOLDER becomes the `compiled` beside this file

compiles everything once for each level of processor, and the best that the processor has is taken at run time. Callers
hold another way to the same result, so "no" costs time and nothing else.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
COMPILED = PACKAGE / "compiled"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
THIS_PROCESSOR = ("-march=native",)
SAME_BITS = ("-ffp-contract=off",)
"""Also without fused multiply-adds, which round otherwise than a twin in NumPy does. -ffast-math is never used."""
COMPILE_TIMEOUT_S = 120

PROGRAMS = {
    PACKAGE / "kernels" / "cpu_attention.c": ("-fopenmp", "-Wno-psabi"),
    PACKAGE / "kernels" / "cpu_experts.c": ("-pthread", "-Wno-psabi"),
    PACKAGE / "kernels" / "cpu_gate.c": ("-Wno-psabi",),
    PACKAGE / "refactor" / "swap.c": SAME_BITS,
}
"""What is compiled beforehand: every C file of the package, with the flags that `library` is asked for it with."""


@dataclass(frozen=True, slots=True)
class Level:
    """A kind of processor: the compiler's flags for it, and what /proc/cpuinfo must list."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = {
    "x86_64": (
        Level("avx512-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _AVX512 | {"avx512_bf16"}),
        Level("avx512", ("-march=x86-64-v4",), _AVX512),
        Level("avx2", ("-march=x86-64-v3",), _AVX2),
        Level("portable", (), frozenset()),
    )
}
"""Best first, by machine. Another machine has the portable one alone."""
PORTABLE = (Level("portable", (), frozenset()),)


def levels() -> tuple[Level, ...]:
    """Those that this processor has, best first."""
    has = processor_flags()
    return tuple(level for level in LEVELS.get(platform.machine(), PORTABLE) if level.needs <= has)


@functools.cache
def processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo lists of the first processor; empty where there is no such file."""
    named = (line.partition(":")[2] for line in _cpuinfo(("flags", "Features")))
    return frozenset(next(named, "").split())


def processor_name() -> str:
    """The model of the first processor as its maker calls it, or the kind of machine where nothing says more."""
    named = (line.partition(":")[2].strip() for line in _cpuinfo(("model name",)))
    return next(named, "") or platform.machine()


def _cpuinfo(named: tuple[str, ...]) -> list[str]:
    """The lines of /proc/cpuinfo that begin so; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(named)]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/prism-runtime, or ~/.cache/prism-runtime."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prism-runtime"


@functools.cache
def library(source: Path, extra_flags: tuple[str, ...] = SAME_BITS) -> ctypes.CDLL | None:
    """The shared library of one C file: compiled beforehand, or now, unless the cache has it. None if it cannot be had.

    The compiler is $CC, or the first of cc, gcc and clang. Processes that compile the same file at the same time each
    write a file of their own and rename it: the last one wins, and all are equal. Functions of a `CDLL` run without the
    interpreter's lock.
    """
    for level in levels():
        if (ready := COMPILED / name_of(source, extra_flags, level)).is_file():
            return _loaded(ready, source, level.name)
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang or $CC): %s runs in Python, much slower", source.stem)
        return None
    try:
        return _loaded(_cached(source, compiler, extra_flags), source, "native")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("%s cannot be compiled with %s, it runs in Python: %s", source.name, compiler, detail)
        return None


def _loaded(path: Path, source: Path, level: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    log.info("compiled code loaded", extra={"program": source.stem, "processor": level})
    return library


def find_compiler() -> str | None:
    return os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def name_of(source: Path, extra_flags: Sequence[str], level: Level) -> str:
    """File of a program compiled beforehand; another one as soon as the source or its flags change."""
    key = hashlib.sha256(source.read_bytes())
    for part in (*FLAGS, *extra_flags, *level.flags):
        key.update(b"\0" + part.encode())
    return f"{source.stem}-{level.name}-{key.hexdigest()[:16]}.so"


def compile_ahead(folder: Path, compiler: str) -> None:
    """Compile every program for every level of this kind of machine. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, extra_flags in PROGRAMS.items():
        flags = list(extra_flags)
        if "-fopenmp" in flags:
            # Its library comes along and is looked for beside the code: a slim image has none.
            said = run_compiler([compiler, "-print-file-name=libgomp.so.1"])
            shutil.copy(said.stdout.strip(), folder / "libgomp.so.1")
            flags.append("-Wl,-rpath,$ORIGIN")
        for level in LEVELS.get(platform.machine(), PORTABLE):
            output = folder / name_of(source, extra_flags, level)
            run_compiler([compiler, *FLAGS, *level.flags, *flags, "-o", str(output), str(source)])


def run_compiler(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Raises OSError or subprocess.SubprocessError."""
    # Without PATH a compiler is found where Python looks then, but does not find its own linker.
    environment = {"PATH": os.defpath} | os.environ
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S, env=environment)


def _cached(source: Path, compiler: str, extra_flags: tuple[str, ...]) -> Path:
    version = run_compiler([compiler, "--version"])
    flags = (*FLAGS, *THIS_PROCESSOR, *extra_flags)
    key = hashlib.sha256(source.read_bytes())
    for part in (compiler, version.stdout, *flags, _processor()):
        key.update(b"\0" + part.encode())
    target = cache_folder() / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compile-") as scratch:
        output = Path(scratch) / target.name
        run_compiler([compiler, *flags, "-o", str(output), str(source)])
        output.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that do not run each other's code."""
    lines = _cpuinfo(("flags", "Features", "model name", "CPU part"))
    return "\n".join(sorted(set(lines))) or f"{platform.machine()} {platform.processor()} {platform.node()}"


def main(arguments: Sequence[str]) -> int:
    compiler = find_compiler()
    if len(arguments) != 1 or compiler is None:
        print(
            "usage: python -m prism_runtime.native FOLDER, with a C compiler (cc, gcc, clang or $CC)", file=sys.stderr
        )
        return 2
    try:
        compile_ahead(Path(arguments[0]), compiler)
    except subprocess.CalledProcessError as error:
        print(f"'{' '.join(error.cmd)}' failed: {error.stderr}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
