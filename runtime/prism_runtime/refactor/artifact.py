"""The elastic artifact on disk: a permuted checkpoint, a sidecar of tensors, and a manifest that is written last.

A reader trusts nothing: every listed file is checked against its digest before a tensor is used, and nothing in an
artifact executes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_api.manifest import MANIFEST_NAME, SCHEMA_VERSION, SIDECAR_NAME, FileEntry, Manifest
from prism_runtime.kernels.contract import GatedLayer
from prism_runtime.kernels.plan import PREFIX, PlanTables
from prism_runtime.refactor.checkpoint import CheckpointRefused, permute_shard, weight_files
from prism_runtime.refactor.partition import Partition, invert
from prism_runtime.refactor.sidecar import (
    GatedRecipe,
    SidecarRefused,
    check_gate_entry,
    gated_tensors,
    gates_of,
    tables_of,
    verify_sidecar,
)

COPIED = ("*.json", "tokenizer*", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
"""Files of a checkpoint that are no weights; they stay byte-identical."""


class ArtifactRefused(ValueError):
    """The directory is not a complete, intact artifact of a version this program knows."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose files have been verified."""

    directory: Path
    manifest: Manifest
    sidecar: Mapping[str, Tensor]

    def tables(self) -> PlanTables:
        """What the operating points mean to the kernels, in ladder order."""
        return tables_of(self.sidecar, self.manifest)

    def gates(self) -> list[GatedLayer]:
        """What threshold and batch points need of every MoE layer; empty if all points are prefixes."""
        return gates_of(self.sidecar, self.manifest)

    def restore_source(self, target: Path) -> None:
        """Write the source checkpoint's weights to the directory `target`, by the inverse permutation."""
        inverse = {layer: invert(self.sidecar[f"layers.{layer}.perm"]) for layer in self.manifest.shape.moe_layers}
        for shard in weight_files(self.directory):
            permute_shard(shard, target / shard.name, inverse)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_weights(directory: Path) -> str:
    """One digest for a checkpoint's weights: of the lines that `sha256sum model*.safetensors` prints."""
    lines = (f"{digest_of(shard).removeprefix('sha256:')}  {shard.name}\n" for shard in weight_files(directory))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------


def write_checkpoint(source: Path, target: Path, perms: Mapping[int, Tensor]) -> None:
    """Write the permuted checkpoint and its other files into the empty directory `target`.

    Raises CheckpointRefused if a layer's experts are nowhere in the weights.
    """
    missing = set(perms)
    for shard in weight_files(source):
        missing -= permute_shard(shard, target / shard.name, perms)
    if missing:
        raise CheckpointRefused(
            f"'{source}' stores no expert weights of layers {sorted(missing)} under a known name; known are "
            f"experts.N.(gate_proj|up_proj|down_proj|w1|w2|w3).weight and experts.(gate_up_proj|down_proj)"
        )
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name not in (MANIFEST_NAME, SIDECAR_NAME):
                shutil.copyfile(path, target / path.name)


def write_sidecar(
    target: Path, partitions: Mapping[int, Partition], counts: Tensor, gated: GatedRecipe | None = None
) -> None:
    """Write partition tensors by decoder layer, and the prefix counts [P, L, K] of the points in manifest order.

    With `gated`, its points choose by threshold or batch instead of their counts, and the manifest's `gate` must be
    its `manifest_entry`.
    """
    tensors = {"mode": torch.full((len(counts),), PREFIX, dtype=torch.int32)}
    if gated is not None:
        tensors = gated_tensors(list(partitions), len(counts), gated)
    for index, (layer, partition) in enumerate(partitions.items()):
        tensors |= {
            f"layers.{layer}.perm": partition.perm.contiguous(),
            f"layers.{layer}.energy": partition.energy.contiguous(),
            f"layers.{layer}.prior": partition.prior.contiguous(),
            f"layers.{layer}.count": counts[:, index].contiguous(),
        }
    save_file(tensors, target / SIDECAR_NAME)


def list_files(target: Path) -> list[FileEntry]:
    """Every file of the artifact but its manifest, with size and digest; makes them readable for every user."""
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and pods run as another user than the one who made the artifact
    return [
        FileEntry(path=path.name, bytes=path.stat().st_size, digest=digest_of(path))
        for path in sorted(target.iterdir())
        if path.name != MANIFEST_NAME
    ]


def write_manifest(target: Path, manifest: Manifest) -> None:
    """Write the manifest atomically; it must come last, because its presence means that the artifact is complete."""
    temporary = target / f".{MANIFEST_NAME}.partial"
    with temporary.open("w") as file:
        file.write(json.dumps(manifest.to_wire(), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target / MANIFEST_NAME)


# -- reading -----------------------------------------------------------------------------------------------------


def open_artifact(directory: Path) -> Artifact:
    """Read and verify an artifact. Raises ArtifactRefused that names the file and what is wrong with it."""
    manifest = _read_manifest(directory / MANIFEST_NAME)
    listed = {entry.path for entry in manifest.files}
    shards = [path.name for path in directory.glob("model*.safetensors")]
    if unlisted := sorted({"config.json", SIDECAR_NAME, *shards} - listed):
        raise ArtifactRefused(f"'{directory}': the manifest does not list {unlisted}; make the artifact again")
    for entry in manifest.files:
        _verify_file(directory, entry)
    try:
        sidecar = load_file(directory / SIDECAR_NAME)
    except SafetensorError as error:
        raise ArtifactRefused(f"'{directory / SIDECAR_NAME}' is not a safetensors file: {error}") from error
    try:
        verify_sidecar(sidecar, manifest)
    except SidecarRefused as error:
        raise ArtifactRefused(f"'{directory / SIDECAR_NAME}' {error}; make the artifact again") from error
    if problem := check_gate_entry(manifest, sidecar):
        raise ArtifactRefused(f"'{directory / MANIFEST_NAME}' {problem}; make the artifact again with this version")
    return Artifact(directory, manifest, sidecar)


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactRefused(
            f"'{path.parent}' has no {MANIFEST_NAME}: it is no artifact, or its making was interrupted. Run "
            f"'prism-runtime refactor MODEL --calibration TEXT --out ARTIFACT'"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactRefused(f"'{path}' is not readable JSON: {error}") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != "prism.artifact":
        raise ArtifactRefused(f"'{path}' is of kind {kind!r}, expected 'prism.artifact'")
    if (version := content.get("schemaVersion")) != SCHEMA_VERSION:
        raise ArtifactRefused(
            f"'{path}' has schemaVersion {version!r}, this version reads {SCHEMA_VERSION}; "
            f"make the artifact again with this version, or use the version that made it"
        )
    try:
        manifest = Manifest.model_validate(content)
        _ = manifest.ladder
    except (ValidationError, ValueError) as error:
        raise ArtifactRefused(f"'{path}' is not a valid manifest: {error}") from error
    return manifest


def _verify_file(directory: Path, entry: FileEntry) -> None:
    path = directory / entry.path
    if Path(entry.path).name != entry.path:
        raise ArtifactRefused(f"'{directory}': the manifest lists '{entry.path}', which is outside of the artifact")
    if not path.is_file():
        raise ArtifactRefused(f"'{path}' is listed in the manifest and missing")
    if (size := path.stat().st_size) != entry.bytes:
        raise ArtifactRefused(f"'{path}' has {size} bytes, the manifest says {entry.bytes}; copy the artifact again")
    if (digest := digest_of(path)) != entry.digest:
        raise ArtifactRefused(
            f"'{path}' has digest {digest}, the manifest says {entry.digest}; copy the artifact again"
        )
