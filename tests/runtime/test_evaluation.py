"""The evaluation of artifacts whose points are prefixes and gated, on a real if tiny model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import open_artifact
from prism_runtime.refactor.assessment import AssessmentOptions, assess_artifact
from prism_runtime.refactor.baselines import OracleGate, Prefix, calibrate_threshold
from prism_runtime.refactor.bytes import StepSubject, measure_touching, touched_by_prefixes, touched_shares
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.evaluate import Subject, evaluate_methods
from prism_runtime.refactor.masked import LayerInput, MaskedModel, token_ids
from prism_runtime.refactor.progress import Reporter
from prism_runtime.refactor.subjects import ARTIFACT, ElasticScores, always, artifact_subjects, cut_of
from prism_runtime.refactor.text import TokenSequence, cut_sequences, read_documents
from tests.runtime.test_gated_artifact import artifact, prefixes  # noqa: F401  (fixtures)

torch.set_num_threads(1)


@pytest.fixture
def text(artifact: Path) -> Path:  # noqa: F811
    return artifact.parent / "text.jsonl"


@pytest.fixture
def sequences(artifact: Path, text: Path) -> list[TokenSequence]:  # noqa: F811
    _, tokenizer = load_pretrained(artifact)
    length = open_artifact(artifact).manifest.calibration.sequence_length
    return cut_sequences(read_documents(text), tokenizer, length, 2)


@pytest.fixture
def assessment(artifact: Path, text: Path) -> dict[str, Any]:  # noqa: F811
    options = AssessmentOptions(sequences=2, baselines=False, step_tokens=(1, 2))
    return assess_artifact(artifact, [text], options, Reporter())


def test_every_point_but_full_is_measured_under_its_name(artifact: Path, assessment: dict[str, Any]) -> None:  # noqa: F811
    rows = [row for row in assessment["rows"] if row["family"] == ARTIFACT]
    assert [row["name"] for row in rows] == open_artifact(artifact).manifest.ladder.names[:-1]
    assert all(row["realisedPermille"] > 0 and row["kl"]["value"] > 0 for row in rows)
    assert all(math.isfinite(row["perplexity"]) for row in rows)


def test_a_step_of_one_token_reads_what_the_token_keeps_and_larger_steps_read_more(
    assessment: dict[str, Any],
) -> None:
    alone, shared = (
        {(point["selection"], point["name"]): point["touchedShare"] for point in step["points"]}
        for step in assessment["steps"]
    )
    assert {"token", "step", "ranked prefix", "prefix", "experts"} == {selection for selection, _ in alone}
    token = next(key for key in alone if key[0] == "token")
    assert shared[token] > alone[token]
    prefix = next(key for key in alone if key[0] == "prefix")
    assert shared[prefix] == pytest.approx(alone[prefix])


def test_a_step_selection_that_keeps_everything_changes_nothing(
    artifact: Path,  # noqa: F811
    sequences: list[TokenSequence],
) -> None:
    opened = open_artifact(artifact)
    masked = MaskedModel(load_pretrained(artifact)[0])
    method = next(each.method for each in artifact_subjects(opened) if isinstance(each.method, ElasticMethod))
    scores = ElasticScores(method, cut_of(opened))
    full = masked.log_probabilities(sequences, None)
    assert (masked.log_probabilities(sequences, scores) - full).abs().max() > 1e-3  # compensation adds its constant
    bare = ElasticScores(ElasticMethod(method.gates, method.log_tau), cut_of(opened))
    assert torch.allclose(masked.log_probabilities(sequences, bare), full, atol=1e-5)


def test_a_cap_on_a_token_s_sub_experts_holds_in_the_evaluation(
    artifact: Path,  # noqa: F811
    sequences: list[TokenSequence],
) -> None:
    opened = open_artifact(artifact)
    masked = MaskedModel(load_pretrained(artifact)[0])
    found = artifact_subjects(opened)[0].method
    assert isinstance(found, ElasticMethod)
    method = replace(found, log_tau=torch.full_like(found.log_tau, -20))  # no score is below: the cap alone limits
    assert int(opened.tables().cap[0]) == 6
    most = []

    def visit(entering: LayerInput) -> torch.Tensor:
        cells, _ = method.cells(masked.slots(entering))
        most.append(int(cells.sum((1, 2)).max()))
        return masked.full(entering)

    masked.run(token_ids(sequences), visit)
    assert most == [6] * len(most)


def test_an_oracle_on_the_model_realises_its_budget(artifact: Path, sequences: list[TokenSequence]) -> None:  # noqa: F811
    cut = cut_of(open_artifact(artifact))
    masked = MaskedModel(load_pretrained(artifact)[0])
    gate = OracleGate("oracle", cut.groups(), cut.sub_experts)
    calibrate_threshold(masked, gate, sequences, 0.5)
    (row,) = evaluate_methods(masked, sequences, [Subject("oracle", 0.5, gate)])
    assert row.realised == pytest.approx(0.5, abs=0.02)


def test_shares_of_several_step_sizes_are_those_of_steps_taken_alone(
    artifact: Path,  # noqa: F811
    sequences: list[TokenSequence],
) -> None:
    opened = open_artifact(artifact)
    masked = MaskedModel(load_pretrained(artifact)[0])
    method = artifact_subjects(opened)[0].method
    shares = touched_shares(masked, sequences, method, fixed=0.05, sizes=(1, 2, 4, 8))
    assert list(shares) == [1, 2, 4]  # four sequences: no step of eight tokens
    for size, share in shares.items():
        (alone,) = measure_touching(masked, sequences, [StepSubject("token", always(method), 0.05)], size)
        assert share == pytest.approx(alone.share, abs=1e-6)
    assert shares[1] < shares[2] < shares[4] <= 1
    assert touched_shares(masked, sequences, method, sizes=(8,)) == {}


def test_bytes_of_prefixes_follow_from_the_routing(artifact: Path, sequences: list[TokenSequence]) -> None:  # noqa: F811
    model = load_pretrained(artifact)[0]
    masked = MaskedModel(model)
    cut = cut_of(open_artifact(artifact))
    uniform = torch.full((cut.layers, cut.top_k), 3)
    ranked = torch.tensor([4, *[1] * (cut.top_k - 1)]).expand(cut.layers, -1)
    shares = touched_by_prefixes(model, sequences, {750: uniform, 400: ranked}, cut.sub_experts, sizes=(1, 2, 4, 8))
    assert shares[750] == {1: 0.75, 2: 0.75, 4: 0.75}
    assert shares[400][1] == pytest.approx(float(ranked[0].float().mean()) / cut.sub_experts)
    assert shares[400][1] < shares[400][2] < shares[400][4] < 1
    assert touched_by_prefixes(model, sequences, {750: uniform}, cut.sub_experts, sizes=(8,)) == {750: {}}
    # One layer's routing does not depend on what earlier layers drop, so there the point itself touches as much.
    whole = torch.full((cut.layers, cut.top_k), cut.sub_experts)
    whole[0] = ranked[0]
    alone = touched_shares(masked, sequences, Prefix("ranked", whole, cut.sub_experts), sizes=(2,))
    first = touched_by_prefixes(model, sequences, {400: whole}, cut.sub_experts, sizes=(2,))
    assert first[400][2] == pytest.approx(alone[2], abs=0.02)
