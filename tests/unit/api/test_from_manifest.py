"""PrismModel from an artifact's manifest."""

import hashlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_api import from_manifest
from prism_api.model import ImageSource, PrismModelSpec, Source

DIGEST = "sha256:" + "a" * 64
IMAGE = Source(image=ImageSource(reference="registry.example/model:1"))


def point(name: str, budget: int, quality: str, low: str) -> dict[str, Any]:
    kl = {"mean": 0.02, "standardError": 0.001, "p99": 0.4, "tokens": 4096}
    measured = {"kl": kl, "sameTop1": 0.97, "realisedPermille": budget}
    rounded = {"relativeQuality": quality, "relativeQualityLow": low}
    return {"name": name, "budgetPermille": budget, "policy": "prefix", **rounded, **measured}


def manifest(**changes: Any) -> bytes:
    shape = {"experts": 8, "topK": 2, "neurons": 64, "hidden": 32, "subExperts": 8, "neuronsPerSubExpert": 8}
    content = {
        "tools": {"prism-runtime": "0.1.0"},
        "source": {
            "name": "org/small-moe",
            "architecture": "OlmoeForCausalLM",
            "licence": "Apache-2.0",
            "digest": DIGEST,
        },
        "shape": {**shape, "moeLayers": [0, 1], "normTopkProb": False},
        "files": [{"path": "model.safetensors", "bytes": 12, "digest": DIGEST}],
        "calibration": {"texts": [], "sequenceLength": 128, "seeds": [0]},
        "partition": {},
        "gate": {},
        "operatingPoints": [point("full", 1000, "1", "1"), point("b750", 750, "0.9810", "0.9790")],
        **changes,
    }
    return json.dumps(content).encode()


def test_the_resource_carries_digest_and_points_and_leaves_the_evidence_in_the_artifact() -> None:
    content = manifest()
    resource = from_manifest.prism_model(content, name="small-moe", namespace="demo", source=IMAGE)
    assert resource["metadata"] == {"name": "small-moe", "namespace": "demo"}
    assert resource["spec"]["digest"] == "sha256:" + hashlib.sha256(content).hexdigest()
    assert resource["spec"]["servedName"] == "small-moe"
    assert resource["spec"]["operatingPoints"] == [
        {
            "name": "b750",
            "budgetPermille": 750,
            "policy": "prefix",
            "relativeQuality": "0.9810",
            "relativeQualityLow": "0.9790",
        },
        {"name": "full", "budgetPermille": 1000, "policy": "prefix", "relativeQuality": "1", "relativeQualityLow": "1"},
    ]


def test_the_resource_reads_back_as_a_typed_model() -> None:
    resource = from_manifest.prism_model(manifest(), name="small-moe", source=IMAGE, served_name="served")
    spec = PrismModelSpec.model_validate(resource["spec"])
    assert spec.served_name == "served"
    assert spec.ladder["b750"].relative_quality_low == Decimal("0.979")


def test_points_whose_quality_falls_as_the_budget_rises_are_refused() -> None:
    points = [point("full", 1000, "1", "1"), point("b750", 750, "0.9", "0.9"), point("b500", 500, "0.95", "0.95")]
    with pytest.raises(ValueError, match="must not fall as budgetPermille rises; 'b500' has"):
        from_manifest.prism_model(manifest(operatingPoints=points), name="small-moe", source=IMAGE)


def test_the_command_prints_a_manifest_for_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prism_manifest.json"
    path.write_bytes(manifest())
    arguments = ["--name", "small-moe", "--image", "registry.example/model:1", "--path", "/artifact"]
    assert from_manifest.main([str(path), *arguments]) == 0
    resource = yaml.safe_load(capsys.readouterr().out)
    assert (resource["apiVersion"], resource["kind"]) == ("moeprism.io/v1alpha1", "PrismModel")
    assert resource["metadata"] == {"name": "small-moe"}
    assert resource["spec"]["source"] == {"image": {"reference": "registry.example/model:1", "path": "/artifact"}}


def test_the_command_prints_a_manifest_for_a_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prism_manifest.json"
    path.write_bytes(manifest())
    assert from_manifest.main([str(path), "--name", "small-moe", "--claim", "models"]) == 0
    source = yaml.safe_load(capsys.readouterr().out)["spec"]["source"]
    assert source == {"persistentVolumeClaim": {"claimName": "models", "path": "/"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"{", "gives no PrismModel"),
        (b"{}", "tools: Field required"),
        (manifest(operatingPoints=[point("b750", 750, "1", "1")]), "must contain 'full' with budgetPermille 1000"),
    ],
    ids=["no file", "no JSON", "no manifest", "no full point"],
)
def test_the_command_says_what_is_wrong_with_a_file_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "prism_manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        from_manifest.main([str(path), "--name", "small-moe", "--image", "model:1"])
    answer = capsys.readouterr()
    assert answer.out == ""
    assert message in answer.err
    assert str(path) in answer.err
