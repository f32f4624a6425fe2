"""The model in examples/model is what its card says: reversible, disjoint texts, quality that falls with the budget."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prism_runtime.engine.engine import Engine
from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import Artifact, digest_of_weights, open_artifact
from prism_runtime.refactor.evaluate import evaluate_points
from prism_runtime.refactor.text import cut_sequences, read_documents
from prism_runtime.refactor.trace import PackedModel
from tests.runtime.models import request, run, stock_greedy, tokens_of

MODEL = Path(__file__).parents[2] / "examples" / "model"


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_artifact(MODEL / "artifact")


def test_inverse_permutation_restores_the_source_weights(artifact: Artifact, tmp_path: Path) -> None:
    artifact.restore_source(tmp_path)
    assert digest_of_weights(tmp_path) == artifact.manifest.source.digest
    assert digest_of_weights(artifact.directory) != artifact.manifest.source.digest


def test_engine_at_full_continues_prompts_as_the_stock_model_does(artifact: Artifact) -> None:
    engine = Engine.from_artifact(artifact.directory)
    stock = AutoModelForCausalLM.from_pretrained(artifact.directory, dtype=torch.float32)
    texts = ["In the beginning", "def read(path):\n    return", "It was a truth universally acknowledged, that a"]
    ids = [tuple(engine.tokenizer.encode(text)) for text in texts]
    for i, prompt in enumerate(ids):
        engine.submit(request(f"r{i}", prompt, max_tokens=16))
    events = run(engine)
    for i, prompt in enumerate(ids):
        assert tokens_of(events, f"r{i}") == stock_greedy(stock, prompt, 16), texts[i]


def test_calibration_and_evaluation_texts_share_no_passage() -> None:
    def passages(name: str) -> set[str]:
        texts = (document.text for document in read_documents(MODEL / name))
        return {text[i : i + 400] for text in texts for i in range(0, len(text) - 400, 400)}

    evaluation = passages("evaluation.jsonl.gz")
    calibration = "\n".join(document.text for document in read_documents(MODEL / "calibration.jsonl.gz"))
    assert len(evaluation) > 500
    assert not [passage[:60] for passage in evaluation if passage in calibration]


def test_the_data_card_repeats_the_manifest(artifact: Artifact) -> None:
    card = (MODEL / "README.md").read_text()
    for point in artifact.manifest.operating_points:
        quality = f"{point.relative_quality} | {point.relative_quality_low}"
        assert re.search(rf"^\| `{point.name}` \|.*\| {re.escape(quality)} \|", card, re.MULTILINE), point.name


def test_quality_of_the_points_falls_with_the_budget_on_held_out_text(artifact: Artifact) -> None:
    model, tokenizer = load_pretrained(artifact.directory)
    length, names = artifact.manifest.calibration.sequence_length, artifact.manifest.ladder.names
    text = cut_sequences(read_documents(MODEL / "evaluation.jsonl.gz"), tokenizer, length, 2)
    points = list(range(len(names)))
    quality = dict(
        zip(
            names,
            evaluate_points(PackedModel(model, artifact.tables(), artifact.gates()), text, points, points[-1]).values(),
            strict=True,
        )
    )
    divergences = [quality[name].kl.mean for name in names]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] == 0
    for point in artifact.manifest.operating_points:
        assert point.kl is not None
        assert quality[point.name].kl.mean == pytest.approx(point.kl.mean, rel=0.3)
        assert quality[point.name].realised_permille == pytest.approx(point.budget_permille, rel=0.05)
