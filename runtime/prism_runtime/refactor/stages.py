"""Steps of a long computation that survive being killed: each output is a file named by everything it depends on.

A stage is run only if no intact output of the same digest is in the work folder, so a run that was killed anywhere and
is started again goes on where it was, and ends with the bytes of a run that was not killed. Several processes may
share a folder: outputs appear whole (temporary file, then rename), and two that run one stage write the same bytes.

Outputs are safetensors files; nothing in a work folder is ever executed, and a damaged file counts as no file.
"""

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

METADATA_KEY = "prism.stage"
"""The only metadata key: safetensors does not order several, and outputs must be equal byte for byte."""

Facts = Mapping[str, Any]


class WorkFolderRefused(ValueError):
    """The work folder cannot be used, or lacks outputs that this command does not make."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step by name, e.g. `partition-3-17`, and the digest of its parameters and of the stages it reads."""

    name: str
    digest: str

    @classmethod
    def of(cls, name: str, parameters: Facts, *inputs: "Stage") -> "Stage":
        """`parameters` must be JSON and hold everything but the inputs that the output depends on."""
        content = {"stage": name, "parameters": parameters, "inputs": [(each.name, each.digest) for each in inputs]}
        return cls(name, hashlib.sha256(_canonical(content)).hexdigest())

    @property
    def file_name(self) -> str:
        return f"{self.name}.{self.digest[:20]}.safetensors"


@dataclass(frozen=True, slots=True)
class Output:
    """What a stage made: tensors that own their memory, and JSON beside them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)


class WorkFolder:
    """Outputs of stages in `folder`, and of other work folders that are only read."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        """Raises WorkFolderRefused if a folder cannot be made or is none."""
        self._folder = folder
        self._others = tuple(others)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkFolderRefused(f"'{folder}' cannot be a work folder: {error}") from error
        for left in folder.glob(".*.safetensors.*"):
            if (folder / left.name[1:].rpartition(".")[0]).exists():  # its writer was killed, or comes too late
                left.unlink(missing_ok=True)
        if absent := [str(other) for other in others if not other.is_dir()]:
            raise WorkFolderRefused(f"no such work folders: {absent}; give what '--work' named")

    def find(self, stage: Stage) -> Output | None:
        """The stage's output, or None if no folder has it intact."""
        for folder in (self._folder, *self._others):
            if (output := _read(folder / stage.file_name, stage)) is not None:
                return output
        return None

    def run(self, stage: Stage, compute: Callable[[], Output]) -> Output:
        """The stage's output, computed only if it is not there."""
        if (found := self.find(stage)) is not None:
            return found
        path = self._folder / stage.file_name
        _write(path, stage, compute())
        # Read back, so that what later stages see is the same, memory layout included, as after a restart.
        written = _read(path, stage)
        if written is None:
            raise WorkFolderRefused(f"'{path}' was damaged while it was written; check the disk")
        return written

    def has(self, stages: Iterable[Stage]) -> bool:
        """Whether every stage has an intact output."""
        return all(self.find(stage) is not None for stage in stages)

    def run_together(self, stages: Sequence[Stage], compute: Callable[[], Iterable[Output]]) -> None:
        """Run stages whose outputs come from one computation, in their order, unless all are there."""
        if self.has(stages):
            return
        for stage, output in zip(stages, compute(), strict=True):
            _write(self._folder / stage.file_name, stage, output)

    def require(self, stages: Sequence[Stage]) -> list[Output]:
        """The outputs of all stages. Raises WorkFolderRefused that names those without an intact one."""
        outputs = {stage: output for stage in stages if (output := self.find(stage)) is not None}
        if missing := [stage for stage in stages if stage not in outputs]:
            folders = ", ".join(f"'{folder}'" for folder in (self._folder, *self._others))
            shown = ", ".join(stage.file_name for stage in missing[:4])
            raise WorkFolderRefused(
                f"{len(missing)} of {len(stages)} outputs are in none of {folders}: {shown}"
                f"{' and more' if len(missing) > 4 else ''}. Run the shards that make them, with the same arguments, "
                f"files and versions"
            )
        return list(outputs.values())


def seed_of(seed: int, *place: int) -> int:
    """A 63-bit seed for one task of a run, e.g. of (layer, expert), whichever process runs it."""
    digest = hashlib.sha256(_canonical([seed, *place])).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of process `index` of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise WorkFolderRefused(f"a shard is I/N with 0 <= I < N, counted from 0; found {self.index}/{self.count}")

    def share(self, tasks: int) -> range:
        """A contiguous range; sizes differ by at most one, and the ranges of all shards cover the tasks once."""
        return range(tasks * self.index // self.count, tasks * (self.index + 1) // self.count)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _content_digest(tensors: Mapping[str, Tensor], facts: Facts) -> str:
    running = hashlib.sha256(_canonical(facts))
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        header = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}".encode()
        running.update(struct.pack("<Q", len(header)) + header)
        running.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def _write(path: Path, stage: Stage, output: Output) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in output.tensors.items()}
    description = {
        "stage": stage.name,
        "digest": stage.digest,
        "content": _content_digest(tensors, output.facts),
        "facts": output.facts,
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file(tensors, temporary, {METADATA_KEY: _canonical(description).decode()})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):  # whoever finished the same stage first has removed it; the bytes are the same
        os.replace(temporary, path)
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def _read(path: Path, stage: Stage) -> Output | None:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        intact = (description["stage"], description["digest"]) == (stage.name, stage.digest) and _content_digest(
            tensors, description["facts"]
        ) == description["content"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return Output(tensors, description["facts"]) if intact else None
