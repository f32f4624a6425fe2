"""Fits on disk: what was fitted once for a model, texts, settings and this code is not fitted again.

A fit is a file of `refactor/stages.py`: safetensors with JSON beside them, nothing that executes, complete or absent,
verified by its digest when it is read. It is named by everything that it depends on, the source of the modules that
fit included, so a change of any of them makes a new file. Of one question the newest few files stay: checkouts with
different code may measure side by side.
"""

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prism_runtime
from prism_runtime.refactor.stages import Output, Stage, WorkFolder
from prism_runtime.refactor.text import TokenSequence
from tests.localcluster.paths import cache

PACKAGE = "prism_runtime"
FITTING = ("prism_runtime.refactor.fit", "prism_runtime.refactor.paper")
VERSIONS_KEPT = 3
LIBRARIES = ("numpy", "torch", "transformers")

Facts = Mapping[str, Any]


class FitCache:
    """The fits of one model.

    model   a digest of its weights; fits of different models lie in different folders
    refit   take nothing that was there before; what this process fits, it reads again
    folder  of all models' fits; None is the user's cache folder
    """

    def __init__(self, model: str, *, refit: bool = False, folder: Path | None = None) -> None:
        self._folder = (folder or cache() / "fits") / model.removeprefix("sha256:")[:20]
        self._work = WorkFolder(self._folder)
        self._refit = refit
        self._fitted: set[str] = set()
        self._code = {"code": code_digest(FITTING), "libraries": {name: version(name) for name in LIBRARIES}}

    def take(self, kind: str, question: Facts, compute: Callable[[], Output]) -> Output:
        """The answer to `question`, JSON that holds everything but model and code; computed if it is not there."""
        asked = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
        stage = Stage.of(f"{kind}-{asked}", {**self._code, "question": question})
        path = self._folder / stage.file_name
        if self._refit and stage.name not in self._fitted:
            path.unlink(missing_ok=True)
        self._fitted.add(stage.name)
        output = self._work.run(stage, compute)
        self._forget_old(stage.name)
        return output

    def _forget_old(self, name: str) -> None:
        ages = []
        for path in self._folder.glob(f"{name}.*.safetensors"):
            with suppress(FileNotFoundError):  # another process forgets, too
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[:-VERSIONS_KEPT]:
            path.unlink(missing_ok=True)


def digest_of_sequences(sequences: Sequence[TokenSequence]) -> str:
    """Of domains and token ids, in their order."""
    running = hashlib.sha256()
    for sequence in sequences:
        running.update(f"{sequence.domain}\0{sequence.ids}\n".encode())
    return running.hexdigest()


def code_digest(modules: Iterable[str]) -> str:
    """Of the source of these modules of the runtime, of all that they import of it, and of the C files beside them."""
    sources = sorted(sources_of(modules))
    return hashlib.sha256(b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources)).hexdigest()


def sources_of(modules: Iterable[str]) -> set[Path]:
    """Files of the modules and of what they import, directly or not, inside of the runtime; C files by their names."""
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        path = _file_of(waiting.pop())
        if path is None or path in found:
            continue
        found.add(path)
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".c"):
                found |= {path.with_name(node.value)} if path.with_name(node.value).is_file() else set()
    return found


def _file_of(module: str) -> Path | None:
    """The module's file; None for a name that is no module of the runtime, such as a class that was imported."""
    if module.split(".")[0] != PACKAGE:
        return None
    path = Path(prism_runtime.__path__[0]).joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None
