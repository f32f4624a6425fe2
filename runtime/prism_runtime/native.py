"""Compiles this package's C at first use and loads it; says no where that cannot be done.

A wheel of pure Python stays one wheel for every platform, and the code is compiled for the very processor it runs on.
Callers hold another way to the same result, so "no" costs time and nothing else.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
SAME_BITS = ("-ffp-contract=off",)
"""Also without fused multiply-adds, which round otherwise than a twin in NumPy does. -ffast-math is never used."""
COMPILE_TIMEOUT_S = 120


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/prism-runtime, or ~/.cache/prism-runtime."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prism-runtime"


@functools.cache
def library(source: Path, extra_flags: tuple[str, ...] = SAME_BITS) -> ctypes.CDLL | None:
    """The shared library of one C file, compiled unless the cache has it. None where it cannot be compiled or loaded.

    The compiler is $CC, or the first of cc, gcc and clang. Processes that compile the same file at the same time each
    write a file of their own and rename it: the last one wins, and all are equal. Functions of a `CDLL` run without the
    interpreter's lock.
    """
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang or $CC): %s runs in Python, much slower", source.stem)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, extra_flags)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("%s cannot be compiled with %s, it runs in Python: %s", source.name, compiler, detail)
        return None


def _compiled(source: Path, compiler: str, extra_flags: tuple[str, ...]) -> Path:
    text = source.read_bytes()
    # Without PATH a compiler is found where Python looks then, but does not find its own linker.
    environment = {"PATH": os.defpath} | os.environ
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S, env=environment
    )
    version = run([compiler, "--version"])
    key = hashlib.sha256(text)
    for part in (compiler, version.stdout, *FLAGS, *extra_flags, _processor()):
        key.update(b"\0" + part.encode())
    target = cache_folder() / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compile-") as scratch:
        output = Path(scratch) / target.name
        run([compiler, *FLAGS, *extra_flags, "-o", str(output), str(source)])
        output.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that do not run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    named = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))
