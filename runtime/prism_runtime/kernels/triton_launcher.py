"""Triton's launcher, compiled beforehand for images without a C compiler.

Triton launches through a module of C that it compiles at the first launch on a GPU, against the driver's library.

    python -m prism_runtime.kernels.triton_launcher FOLDER

compiles the same source on a machine without a GPU: the driver's functions are found when the module is loaded.
"""

import hashlib
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from prism_runtime import native

MODULE = "cuda_utils"
DRIVER = "libcuda.so.1"


def _name_of(source: Path) -> str:
    """Another one as soon as Triton's source or the interpreter's binary interface changes."""
    key = hashlib.sha256(source.read_bytes() + sysconfig.get_config_var("EXT_SUFFIX").encode())
    return f"{MODULE}-{key.hexdigest()[:16]}.so"


def compile_ahead(folder: Path, compiler: str) -> None:
    """Compile Triton's module into the folder. Raises subprocess.CalledProcessError, or RuntimeError without Triton."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        raise RuntimeError("Triton is not installed here; there is no launcher to compile")
    source = Path(found.origin).parent / "backends" / "nvidia" / "driver.c"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty.c"
        empty.touch()
        stand_in = Path(scratch) / DRIVER
        native.run_compiler([compiler, "-shared", f"-Wl,-soname,{DRIVER}", "-o", str(stand_in), str(empty)])
        native.run_compiler(
            [
                *(compiler, str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-Wl,--no-as-needed"),
                *(f"-I{source.parent / 'include'}", f"-I{sysconfig.get_config_var('INCLUDEPY')}"),
                *("-o", str(folder / _name_of(source)), str(stand_in)),
            ]
        )


def use_compiled() -> bool:
    """Make Triton take the module that was compiled beforehand, if there is one for its source."""
    import triton

    source = Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    ready = native.COMPILED / _name_of(source)
    if not ready.is_file():
        return False

    def build(name: str, *_: object) -> str:
        if name != MODULE:
            raise RuntimeError(f"Triton wants to compile '{name}', and this image has its '{MODULE}' alone")
        return str(ready)

    triton.knobs.build.impl = build
    return True


def main(arguments: Sequence[str]) -> int:
    compiler = native.find_compiler()
    if len(arguments) != 1 or compiler is None:
        usage = "usage: python -m prism_runtime.kernels.triton_launcher FOLDER, where there is cc, gcc, clang or $CC"
        print(usage, file=sys.stderr)
        return 2
    compile_ahead(Path(arguments[0]), compiler)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
