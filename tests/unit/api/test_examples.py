"""The example manifests: typed, consistent with one another, and generated where they must not be typed by hand."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_api import API_VERSION, from_manifest
from prism_api.model import ImageSource, PrismModelSpec, Source
from prism_api.points import Ladder
from prism_api.scaling import ScalingControl
from prism_api.service import PrismServiceSpec

EXAMPLES = Path(__file__).parents[3] / "examples"
USE_CASES = sorted(path for path in (EXAMPLES / "services").iterdir() if path.is_dir())
FILES = [EXAMPLES / "prismservice.yaml", *sorted(EXAMPLES.glob("services/*/*.yaml"))]
MANIFEST = EXAMPLES / "model/artifact/prism_manifest.json"
REGENERATE = (
    "run: python -m prism_api.from_manifest examples/model/artifact/prism_manifest.json --name small-moe "
    "--namespace demo --image registry.local:5000/moeprism/model:0.1.0 > examples/prismmodel.yaml"
)


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def services() -> dict[str, PrismServiceSpec]:
    return {
        str(path.relative_to(EXAMPLES)): PrismServiceSpec.model_validate(document["spec"])
        for path in FILES
        for document in documents(path)
        if document["kind"] == "PrismService"
    }


def ladder() -> Ladder:
    (model,) = documents(EXAMPLES / "prismmodel.yaml")
    return PrismModelSpec.model_validate(model["spec"]).ladder


def test_the_model_is_the_one_that_its_artifact_describes() -> None:
    (model,) = documents(EXAMPLES / "prismmodel.yaml")
    reference = model["spec"]["source"]["image"]["reference"]
    assert model == from_manifest.prism_model(
        MANIFEST.read_bytes(),
        name="small-moe",
        namespace="demo",
        source=Source(image=ImageSource(reference=reference)),
    ), REGENERATE


def test_every_service_serves_the_embedded_model_from_the_local_registry() -> None:
    assert len(services()) >= 7
    for name, spec in services().items():
        assert spec.model_ref.name == "small-moe", name
        assert spec.runtime.image.startswith("registry.local:5000/moeprism/runtime:"), name


def test_every_operating_point_that_an_example_names_is_on_the_models_ladder() -> None:
    for name, spec in services().items():
        points = {spec.budget.operating_point, spec.budget.min, spec.budget.max, spec.budget.safe_point} - {None}
        assert [point for point in points if point not in ladder()] == [], name


def test_the_demo_has_a_knob_within_the_floors_of_its_classes() -> None:
    spec = services()["prismservice.yaml"]
    floors = {c.name: ladder().floor_for(c.quality.min_relative_quality).budget_permille for c in spec.classes}
    assert floors["interactive"] < 1000
    assert floors["batch"] <= floors["interactive"]
    assert spec.default_class_name == "interactive"


@pytest.mark.parametrize("folder", USE_CASES, ids=lambda folder: folder.name)
def test_every_use_case_says_what_it_is_for_and_how_to_apply_it(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    manifests = sorted(path.name for path in folder.glob("*.yaml"))
    assert manifests
    assert [name for name in manifests if name not in readme] == []
    assert "kubectl apply" in readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_autoscaler_aims_at_the_service_beside_it(path: Path) -> None:
    for document in documents(path):
        target = document["spec"].get("scaleTargetRef") if "spec" in document else None
        if target is not None:
            assert (target["apiVersion"], target["kind"]) == (API_VERSION, "PrismService")
            (service,) = documents(path.parent / "prismservice.yaml")
            assert target["name"] == service["metadata"]["name"]
            assert document["metadata"]["namespace"] == service["metadata"]["namespace"]
            assert PrismServiceSpec.model_validate(service["spec"]).scaling.control is ScalingControl.EXTERNAL
