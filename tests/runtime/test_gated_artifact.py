"""An artifact with gates: read back as written, run by the engine, refused when damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_api.manifest import MANIFEST_NAME, SIDECAR_NAME
from prism_runtime.engine.engine import Engine
from prism_runtime.kernels.plan import BATCH, PREFIX, THRESHOLD
from prism_runtime.refactor.artifact import ArtifactRefused, list_files, open_artifact, write_manifest, write_sidecar
from prism_runtime.refactor.partition import Partition
from prism_runtime.refactor.recipe import refactor_model
from prism_runtime.refactor.request import RefactorRequest
from tests.runtime.gated import RANK, made_up_recipe
from tests.runtime.letters import write_source
from tests.runtime.models import prompts, request, run, tokens_of


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact with prefix points alone."""
    source = write_source(tmp_path_factory.mktemp("source"))
    out = source.parent / "prefixes"
    text = source.parent / "text.jsonl"
    refactor_model(RefactorRequest(source, calibration=text, policy="sorted", sub_experts=4), out)
    return out


@pytest.fixture(scope="module")
def artifact(prefixes: Path) -> Path:
    """The same with its two smallest points gated."""
    out = Path(shutil.copytree(prefixes, prefixes.parent / "gated"))
    opened = open_artifact(prefixes)
    layers = opened.manifest.shape.moe_layers
    partitions = {
        layer: Partition(*(opened.sidecar[f"layers.{layer}.{name}"] for name in ("perm", "energy", "prior")))
        for layer in layers
    }
    counts = torch.stack([opened.sidecar[f"layers.{layer}.count"] for layer in layers], 1)
    recipe = made_up_recipe(opened.manifest.shape)
    write_sidecar(out, partitions, counts, recipe)
    gate = recipe.manifest_entry(features=["x"])
    write_manifest(out, opened.manifest.model_copy(update={"gate": gate, "files": list_files(out)}))
    return out


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def test_gates_and_points_are_read_as_they_were_written(artifact: Path) -> None:
    opened = open_artifact(artifact)
    recipe, tables = made_up_recipe(opened.manifest.shape), opened.tables()
    assert tables.mode.tolist() == [THRESHOLD, BATCH] + [PREFIX] * (len(tables.mode) - 2)
    assert (tables.cap[0], tables.share[1].tolist()) == (6, [0.5, 0.5])
    for layer, gated in enumerate(opened.gates()):
        for name in ("weight", "bias", "mean", "deviation", "token"):
            assert torch.equal(getattr(gated.gate, name), getattr(recipe.gates[layer], name))
        assert gated.gate.kappa == 1.7
        assert list(gated.compensation) == [0]
        assert torch.equal(gated.compensation[0].c, recipe.points[0].compensation[layer].c)


def test_artifact_of_prefixes_needs_no_gate(prefixes: Path) -> None:
    opened = open_artifact(prefixes)
    assert opened.gates() == []
    assert not opened.tables().gated


def test_compensation_follows_its_point_if_the_manifest_lists_points_in_another_order(copy: Path) -> None:
    expected = open_artifact(copy)
    manifest, sidecar = json.loads((copy / MANIFEST_NAME).read_text()), load_file(copy / SIDECAR_NAME)
    last = len(manifest["operatingPoints"]) - 1
    manifest["operatingPoints"].reverse()
    moved = {}
    for name, tensor in sidecar.items():
        by_point = name in ("mode", "tau", "share", "cap") or name.endswith(".count")
        moved[name.replace(".comp.0.", f".comp.{last}.")] = tensor.flip(0) if by_point else tensor
    save_file(moved, copy / SIDECAR_NAME)
    reseal(copy, manifest)
    opened = open_artifact(copy)
    assert torch.equal(opened.tables().mode, expected.tables().mode)
    assert torch.equal(opened.gates()[1].compensation[0].a, expected.gates()[1].compensation[0].a)


def test_engine_runs_every_point_and_full_is_untouched_by_gates(artifact: Path, prefixes: Path) -> None:
    texts = prompts([20, 33])
    tokens = {}
    for directory in (artifact, prefixes):
        engine = Engine.from_artifact(directory, max_context_tokens=64)
        for i, prompt in enumerate(texts):
            engine.submit(request(f"r{i}", prompt, max_tokens=8))
        events = run(engine)
        tokens[directory] = [tokens_of(events, f"r{i}") for i in range(2)]
        assert engine.model.plan.realised_budget == 1
    assert tokens[artifact] == tokens[prefixes]

    engine = Engine.from_artifact(artifact, max_context_tokens=64)
    for point in (0, 1):
        engine.model.set_points([point])
        engine.model.plan.reset_counters()
        engine.submit(request("r", texts[0], max_tokens=8))
        assert len(tokens_of(run(engine), "r")) == 8
        assert 0.1 < engine.model.plan.realised_budget < 0.9


def reseal(directory: Path, manifest: dict[str, Any]) -> None:
    """Make the manifest agree with the files again, so that only the damage under test is left."""
    manifest["files"] = [entry.to_wire() for entry in list_files(directory)]
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def sidecar_with(**changes: torch.Tensor | None) -> Callable[[Path, dict[str, Any]], None]:
    """Replace tensors by name, or drop them; `__` stands for a dot."""

    def damage(directory: Path, manifest: dict[str, Any]) -> None:
        sidecar = load_file(directory / SIDECAR_NAME)
        for name, value in changes.items():
            sidecar.pop(name.replace("__", "."), None)
            if value is not None:
                sidecar[name.replace("__", ".")] = value
        save_file(sidecar, directory / SIDECAR_NAME)
        reseal(directory, manifest)

    return damage


def gate_with(**gate: object) -> Callable[[Path, dict[str, Any]], None]:
    def damage(directory: Path, manifest: dict[str, Any]) -> None:
        reseal(directory, manifest | {"gate": gate})

    return damage


def mode_of_a_later_version(directory: Path, manifest: dict[str, Any]) -> None:
    mode = load_file(directory / SIDECAR_NAME)["mode"]
    mode[0] = 9
    sidecar_with(mode=mode)(directory, manifest)


def full_by_threshold(directory: Path, manifest: dict[str, Any]) -> None:
    sidecar_with(mode=torch.full_like(load_file(directory / SIDECAR_NAME)["mode"], THRESHOLD))(directory, manifest)


def cut_sidecar(directory: Path, manifest: dict[str, Any]) -> None:
    path = directory / SIDECAR_NAME
    path.write_bytes(path.read_bytes()[:-40])
    reseal(directory, manifest)


GATE = "layers__0__gate__"
NAN = torch.full((8, 4), torch.nan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (sidecar_with(**{f"{GATE}weight": None}), r"gate.weight' as torch.bfloat16 \[8, 4, 48\]; found nothing"),
        (sidecar_with(**{f"{GATE}weight": torch.zeros(8, 4, 48)}), r"bfloat16 .*; found torch.float32 \[8, 4, 48\]"),
        (
            sidecar_with(**{f"{GATE}bias": torch.zeros(8, 2)}),
            r"'layers.0.gate.bias' as .* found torch.float32 \[8, 2\]",
        ),
        (sidecar_with(**{f"{GATE}mean": NAN}), "holds values in 'layers.0.gate.mean' that are not finite"),
        (sidecar_with(**{f"{GATE}deviation": -torch.ones(8, 4)}), "'layers.0.gate.deviation' has negative values"),
        (sidecar_with(layers__1__token__weight=None), r"must hold 'layers.1.token.weight' as torch.float32 \[51\]"),
        (sidecar_with(layers__1__comp__0__U=None), rf"'layers.1.comp.0.U' as torch.float32 \[{RANK}, 48\]; found noth"),
        (sidecar_with(layers__0__comp__0__c=torch.zeros(8, 4, 9)), r"comp.0.c' as .*; found torch.float32 \[8, 4, 9\]"),
        (
            sidecar_with(layers__0__comp__2__U=torch.zeros(RANK, 48)),
            "compensation 'comp.2' for a point that has no gate",
        ),
        (sidecar_with(tau=None), "must hold 'tau' as torch.float32"),
        (sidecar_with(cap=None), "must hold 'cap' as torch.int32"),
        (mode_of_a_later_version, r"selection modes \[9\] are not known to this version; known: 0 \(prefix\)"),
        (full_by_threshold, "makes 'full' run less than all 4 sub-experts"),
        (cut_sidecar, "prism_sidecar.safetensors' is not a safetensors file"),
        (
            gate_with(kind="pca"),
            "manifest.json' has a gate of kind 'pca' for points with thresholds; this version runs",
        ),
        (
            gate_with(kind="logRidge", kappa=-1),
            "manifest.json' has gate.kappa -1; it must be a number above 0, or null",
        ),
    ],
)
def test_damaged_or_skewed_gates_are_refused_with_the_file_and_the_reason(
    copy: Path, damage: Callable[[Path, dict[str, Any]], None], message: str
) -> None:
    damage(copy, json.loads((copy / MANIFEST_NAME).read_text()))
    with pytest.raises(ArtifactRefused, match=message) as refused:
        Engine.from_artifact(copy)
    assert str(copy) in str(refused.value)
