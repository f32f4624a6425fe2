"""The artifact: stock-loadable, reversible, complete or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prism_api.manifest import MANIFEST_NAME, SIDECAR_NAME
from prism_runtime.__main__ import main
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.experts_hook import experts_modules, fused_projections
from prism_runtime.refactor.artifact import ArtifactRefused, digest_of, digest_of_weights, open_artifact
from prism_runtime.refactor.checkpoint import CheckpointRefused, permute_shard
from prism_runtime.refactor.partition import invert
from prism_runtime.refactor.recipe import refactor_model
from prism_runtime.refactor.request import RecipeRefused, RefactorRequest
from tests.runtime.letters import write_source
from tests.runtime.models import ARCHITECTURES, VOCABULARY, prompts, request, run, stock_greedy, tiny_model, tokens_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer of letters, and text for it."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def artifact(source: Path) -> Path:
    out = source.parent / "artifact"
    refactor_model(letters(source), out)
    return out


def letters(source: Path, **changed: Any) -> RefactorRequest:
    """The request of the tests, for the text beside `source`."""
    arguments: dict[str, Any] = {"calibration": source.parent / "text.jsonl", "policy": "sorted", "sub_experts": 4}
    return RefactorRequest(source, **arguments | changed)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_permuted_checkpoint_is_a_stock_model_with_the_same_logits_and_the_inverse_restores_its_bytes(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    perms = {}
    for layer, experts in experts_modules(model):
        shape = fused_projections(experts)[0].shape[:2]
        perms[layer] = torch.rand(shape, generator=generator).argsort(1).int()
    shutil.copytree(tmp_path / "source", tmp_path / "permuted")
    shard = tmp_path / "source" / "model.safetensors"
    assert permute_shard(shard, tmp_path / "permuted" / "model.safetensors", perms) == set(perms)
    permuted = AutoModelForCausalLM.from_pretrained(tmp_path / "permuted")
    for (_, before), (_, after) in zip(experts_modules(model), experts_modules(permuted), strict=True):
        assert not torch.equal(before.down_proj, after.down_proj)
    ids = torch.tensor(prompts([20]))
    with torch.inference_mode():
        torch.testing.assert_close(permuted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)

    restored = tmp_path / "restored.safetensors"
    inverse = {layer: invert(perm) for layer, perm in perms.items()}
    permute_shard(tmp_path / "permuted" / "model.safetensors", restored, inverse)
    assert restored.read_bytes() == shard.read_bytes()


def test_artifact_restores_the_source_byte_for_byte(source: Path, artifact: Path, tmp_path: Path) -> None:
    assert digest_of(artifact / "model.safetensors") != digest_of(source / "model.safetensors")
    opened = open_artifact(artifact)
    opened.restore_source(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert digest_of_weights(tmp_path) == opened.manifest.source.digest
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (artifact / name).read_bytes() == (source / name).read_bytes()


def test_engine_over_the_artifact_gives_the_greedy_tokens_of_the_source(source: Path, artifact: Path) -> None:
    engine = Engine.from_artifact(artifact, max_context_tokens=64)
    assert (engine.vocabulary_size, engine.max_context_tokens) == (VOCABULARY, 64)
    assert engine.tokenizer.encode("abc") == [0, 1, 2]
    stock = AutoModelForCausalLM.from_pretrained(source)
    texts = prompts([12, 30])
    for i, prompt in enumerate(texts):
        engine.submit(request(f"r{i}", prompt, max_tokens=12))
    events = run(engine)
    for i, prompt in enumerate(texts):
        assert tokens_of(events, f"r{i}") == stock_greedy(stock, prompt, 12)


def test_model_with_dense_layers_is_partitioned_in_its_moe_layers_alone(source: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(source, tmp_path / "mixed"))
    stock = tiny_model("qwen3_moe", mlp_only_layers=[0])
    stock.save_pretrained(mixed)
    text = source.parent / "text.jsonl"
    manifest = refactor_model(letters(mixed, calibration=text, points_permille=(500,)), tmp_path / "out")
    assert manifest.shape.moe_layers == [1]
    engine = Engine.from_artifact(tmp_path / "out", max_context_tokens=64)
    (prompt,) = prompts([20])
    engine.submit(request("a", prompt, max_tokens=10))
    assert tokens_of(run(engine), "a") == stock_greedy(stock, prompt, 10)


def test_manifest_holds_a_monotone_ladder_that_ends_at_full_and_was_measured(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    assert manifest.ladder.names[-1] == "full"
    lows = [point.relative_quality_low for point in manifest.operating_points]
    assert lows == sorted(set(lows))
    assert len(lows) > 1
    for point in manifest.operating_points:
        assert point.kl is not None
        assert point.realised_permille == point.budget_permille
        assert point.kl.mean > 0 or point.name == "full"
    assert {text.name for text in manifest.calibration.texts} == {"text.jsonl#d0", "text.jsonl#d1"}


def test_sub_experts_of_the_artifact_descend_in_energy(artifact: Path) -> None:
    opened = open_artifact(artifact)
    for layer in opened.manifest.shape.moe_layers:
        assert (opened.sidecar[f"layers.{layer}.energy"].diff(dim=1) <= 0).all()


def test_tables_follow_the_ladder_even_if_the_manifest_lists_points_in_another_order(copy: Path) -> None:
    expected = open_artifact(copy).tables().count
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    sidecar = load_file(copy / SIDECAR_NAME)
    manifest["operatingPoints"].reverse()
    for layer in manifest["shape"]["moeLayers"]:
        sidecar[f"layers.{layer}.count"] = sidecar[f"layers.{layer}.count"].flip(0)
    save_file(sidecar, copy / SIDECAR_NAME)
    reseal(copy, manifest)
    assert torch.equal(open_artifact(copy).tables().count, expected)


def reseal(directory: Path, manifest: dict) -> None:
    """Make the manifest agree with the files again, so that only the damage under test is left."""
    for entry in manifest["files"]:
        path = directory / entry["path"]
        if path.is_file():
            entry.update(bytes=path.stat().st_size, digest=digest_of(path))
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def flip_a_byte(name: str) -> Callable[[Path, dict], None]:
    def damage(directory: Path, _: dict) -> None:
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)

    return damage


def truncate(directory: Path, _: dict) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(**changes: object) -> Callable[[Path, dict], None]:
    def damage(directory: Path, manifest: dict) -> None:
        (directory / MANIFEST_NAME).write_text(json.dumps(manifest | changes))

    return damage


def break_sidecar(key: str, value: torch.Tensor | None) -> Callable[[Path, dict], None]:
    def damage(directory: Path, manifest: dict) -> None:
        sidecar = load_file(directory / SIDECAR_NAME)
        del sidecar[key]
        save_file(sidecar if value is None else {**sidecar, key: value}, directory / SIDECAR_NAME)
        reseal(directory, manifest)

    return damage


def unlist_weights(directory: Path, manifest: dict) -> None:
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "model.safetensors"]
    reseal(directory, manifest)


def list_outside(directory: Path, manifest: dict) -> None:
    manifest["files"].append({"path": "../tiny/config.json", "bytes": 1, "digest": "sha256:" + "0" * 64})
    reseal(directory, manifest)


def scramble_sidecar(directory: Path, manifest: dict) -> None:
    (directory / SIDECAR_NAME).write_bytes(b"no tensors here")
    reseal(directory, manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d, m: (d / MANIFEST_NAME).unlink(), "has no prism_manifest.json: it is no artifact, or its making was"),
        (lambda d, m: (d / MANIFEST_NAME).write_text("{"), "prism_manifest.json' is not readable JSON"),
        (lambda d, m: (d / MANIFEST_NAME).write_text("[]"), "is of kind None, expected 'prism.artifact'"),
        (edit(kind="other"), "is of kind 'other'"),
        (edit(schemaVersion=2), "has schemaVersion 2, this version reads 1; make the artifact again"),
        (edit(shape={}), "is not a valid manifest"),
        (edit(operatingPoints=[]), "is not a valid manifest"),
        (flip_a_byte("model.safetensors"), "model.safetensors' has digest sha256:"),
        (flip_a_byte("tokenizer.json"), "tokenizer.json' has digest sha256:"),
        (flip_a_byte(SIDECAR_NAME), "prism_sidecar.safetensors' has digest sha256:"),
        (truncate, r"model.safetensors' has \d+ bytes, the manifest says \d+"),
        (lambda d, m: (d / SIDECAR_NAME).unlink(), "prism_sidecar.safetensors' is listed in the manifest and missing"),
        (scramble_sidecar, "prism_sidecar.safetensors' is not a safetensors file"),
        (break_sidecar("layers.1.perm", None), r"must hold 'layers.1.perm' as torch.int32 \[8, 32\]; found nothing"),
        (break_sidecar("layers.0.perm", torch.zeros(8, 32, dtype=torch.int32)), "'layers.0.perm' is not a permutation"),
        (unlist_weights, r"the manifest does not list \['model.safetensors'\]"),
        (list_outside, "lists '../tiny/config.json', which is outside of the artifact"),
    ],
)
def test_damaged_or_foreign_artifact_is_refused_with_the_file_and_the_reason(
    copy: Path, damage: Callable[[Path, dict], None], message: str
) -> None:
    damage(copy, json.loads((copy / MANIFEST_NAME).read_text()))
    with pytest.raises(ArtifactRefused, match=message):
        Engine.from_artifact(copy)


def test_unknown_keys_of_a_newer_manifest_are_ignored(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest | {"later": 1}))
    assert open_artifact(copy).manifest == open_artifact(copy).manifest


def test_same_source_and_text_give_the_same_bytes(source: Path, artifact: Path, tmp_path: Path) -> None:
    refactor_model(letters(source), tmp_path / "again")
    for path in artifact.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_refactoring_that_fails_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(32, 48).to(torch.float8_e4m3fn)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match="quantised experts cannot be partitioned"):
        refactor_model(letters(broken, calibration=source.parent / "text.jsonl"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_folder_without_a_checkpoint_is_refused_before_anything_is_loaded(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeRefused, match=r"has no config.json; MODEL must be the folder of a Hugging Face checkpoint"
    ):
        letters(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sub_experts": 0}, "--sub-experts must be at least 1; found 0"),
        ({"rank": 0}, "--rank must be at least 1; found 0. '--compensation none' fits none"),
        ({"threads": 0}, "--threads must be at least 1; found 0"),
        ({"policy": "best"}, "policy is one of prism, paper, sorted, random; found 'best'"),
        ({"calibration": Path("absent.txt")}, "there is no text file 'absent.txt'"),
    ],
)
def test_argument_that_cannot_be_is_refused(changed: dict[str, Any], message: str, source: Path) -> None:
    with pytest.raises(RecipeRefused, match=message):
        letters(source, **changed)


def test_rank_above_the_hidden_width_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="--rank is at most the model's hidden width 48; found 49"):
        refactor_model(letters(source, policy="prism", rank=49), tmp_path / "out")


def test_plain_text_alone_is_enough_if_it_is_long_and_refused_with_the_remedy_if_not(
    source: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("it was a dark and stormy night.\n" * 800)
    manifest = refactor_model(letters(source, calibration=book, points_permille=(500,)), tmp_path / "out")
    assert [text.name for text in manifest.calibration.texts] == ["book.txt#text"]
    book.write_text("it was a dark and stormy night.\n" * 80)
    with pytest.raises(RecipeRefused, match=r"has 1 documents, too few to hold one out .* or --evaluation FILE"):
        refactor_model(letters(source, calibration=book), tmp_path / "other")


def test_existing_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="exists already; give a new directory"):
        refactor_model(letters(source), tmp_path)


def test_command_line_makes_and_measures_an_artifact(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = str(source.parent / "text.jsonl"), str(tmp_path / "out")
    arguments = [str(source), "--calibration", text, "--out", out, "--sub-experts", "4"]
    assert main(["refactor", *arguments, "--points", "500", "--policy", "sorted"]) == 0
    html = tmp_path / "page.html"
    flags = ["--text", text, "--sequences", "2", "--calibration", text, "--steps", "2", "--json", "--html", str(html)]
    capsys.readouterr()
    assert main(["evaluate", out, *flags]) == 0
    measured = json.loads(capsys.readouterr().out)
    rows = {(row["family"], row["nominalPermille"]): row for row in measured["rows"]}
    point = rows["artifact", 500]
    assert (point["name"], point["realisedPermille"]) == ("b500", 500.0)
    assert set(point["klByDomain"]) == {"d0", "d1"}
    assert rows["full", 1000]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert 500 < rows["paper", 500]["realisedPermille"] < 1000  # its gate costs beside what it keeps
    assert rows["neuron oracle", 500]["kl"]["value"] < rows["static pruning", 500]["kl"]["value"]
    assert len(point["errorByLayer"]["dense"]) == len(point["realisedByLayer"])
    assert measured["points"]["artifact"]["candidates"] == 2
    assert measured["steps"][0]["stepTokens"] == 2
    assert html.read_text().startswith("<!doctype html>")


def test_command_line_refuses_with_one_sentence_and_status_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path), "--text", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prism-runtime: '")
    assert "has no prism_manifest.json" in error
    assert error.count("\n") == 1
