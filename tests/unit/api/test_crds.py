"""Rules that every node of the generated CRDs keeps, whatever resource it belongs to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_api import crd
from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec
from tests.cluster.invalid_manifests import CREATIONS, UPDATES

ROOT = Path(__file__).parents[3]
Schema = dict[str, Any]


def schemas() -> dict[str, Schema]:
    definitions = crd.all_definitions().values()
    return {d["spec"]["names"]["kind"]: d["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for d in definitions}


def nodes(node: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from nodes(node["additionalProperties"], f"{path}{{}}")


NODES = [
    pair
    for kind, schema in schemas().items()
    for block in ("spec", "status")
    for pair in nodes(schema["properties"][block], f"{kind}.{block}")
]


def test_the_walk_reaches_the_deepest_fields() -> None:
    paths = {path for path, _ in NODES}
    assert "PrismService.spec.pools[].accelerator.resource.count" in paths
    assert "PrismService.status.decisions[].from" in paths
    assert "PrismModel.spec.operatingPoints[].budgetPermille" in paths


def test_every_node_has_one_type_and_none_is_a_float_or_a_bare_boolean() -> None:
    assert [path for path, node in NODES if node.get("type") not in {"object", "array", "string", "integer"}] == []


def test_every_node_is_described() -> None:
    assert [path for path, node in NODES if len(node.get("description", "").strip()) < 5] == []


def test_every_node_is_bounded() -> None:
    assert [path for path, node in NODES if not bounds_of(node) <= node.keys()] == []


def bounds_of(node: Schema) -> set[str]:
    """Keywords that a node of its type needs: without them the server cannot bound the cost of a rule."""
    return {
        "integer": {"minimum", "maximum"},
        "array": {"maxItems"},
        "object": {"maxProperties"} if "additionalProperties" in node else set(),
        "string": set() if "enum" in node else {"maxLength"},
    }[node["type"]]


def test_no_node_keeps_unknown_fields() -> None:
    def closed(node: Schema) -> bool:
        return "properties" in node or isinstance(node.get("additionalProperties"), dict)

    assert [path for path, node in NODES if "x-kubernetes-preserve-unknown-fields" in node] == []
    assert [path for path, node in NODES if node["type"] == "object" and not closed(node)] == []


def test_no_node_has_keywords_that_a_structural_schema_refuses() -> None:
    refused = {"$ref", "$defs", "anyOf", "allOf", "oneOf", "title", "const", "discriminator"}
    assert [path for path, node in NODES if not refused.isdisjoint(node)] == []


def test_enum_values_are_camel_case() -> None:
    values = [(path, value) for path, node in NODES for value in node.get("enum", ())]
    assert len(values) > 10
    assert [(path, value) for path, value in values if not (value[0].isupper() and value.isalnum())] == []


def test_lists_of_named_objects_merge_by_name_and_conditions_by_type() -> None:
    lists = {path: node for path, node in NODES if node["type"] == "array" and node["items"]["type"] == "object"}
    merged = {path: node.get("x-kubernetes-list-map-keys") for path, node in lists.items()}
    named = {path for path, node in lists.items() if "name" in node["items"].get("required", ())}
    assert {path for path in named if merged[path] != ["name"]} == set()
    assert {path: keys for path, keys in merged.items() if path.endswith("conditions")} == {
        "PrismService.status.conditions": ["type"],
        "PrismModel.status.conditions": ["type"],
    }


def test_a_block_that_may_be_left_out_has_a_default_if_a_field_in_it_has_one() -> None:
    """Otherwise the nested default would not be filled in. A block with a required field has to be written anyway."""
    lost = [
        f"{path}.{name}"
        for path, node in NODES
        for name, child in node.get("properties", {}).items()
        if child["type"] == "object" and "default" not in child
        if not child.get("required") and name not in node.get("required", ())
        if any("default" in inner for _, inner in nodes(child, name))
    ]
    assert lost == []


def test_a_default_of_a_block_spells_out_the_defaults_in_it() -> None:
    """The server checks a block's default against the block's rules before it fills in nested defaults."""
    blocks = [(path, node) for path, node in NODES if node["type"] == "object" and "default" in node]
    assert len(blocks) > 5
    for path, node in blocks:
        inner = {name: child["default"] for name, child in node["properties"].items() if "default" in child}
        assert inner.items() <= node["default"].items(), path


def test_field_names_are_camel_case_and_spell_out_their_unit() -> None:
    names = {name for _, node in NODES for name in node.get("properties", {})}
    shortened = ("Ms", "Sec", "Secs", "Percent", "Timeout", "Duration")
    assert {n for n in names if not (n[0].islower() and n.isalnum()) or n.endswith(shortened)} == set()


def test_every_rule_of_the_crds_has_a_manifest_that_breaks_it() -> None:
    rules = [rule for schema in schemas().values() for _, node in nodes(schema, "") for rule in rules_of(node)]
    answers = " ".join(answer for row in (*CREATIONS, *UPDATES) for answer in row.answers)
    untested = [rule["message"] for rule in rules if rule["message"].partition(";")[0][:40] not in answers]
    assert len(rules) >= 15
    assert untested == []


def rules_of(node: Schema) -> list[dict[str, str]]:
    rules: list[dict[str, str]] = node.get("x-kubernetes-validations", [])
    return rules


def test_the_crd_files_in_both_folders_are_those_of_the_typed_resources() -> None:
    for name, definition in crd.all_definitions().items():
        for folder in ("crds", "helm/prism/files/crds"):
            assert (ROOT / folder / name).read_text() == crd.render(definition), f"{folder}/{name}: run `make generate`"


def test_a_crd_file_reads_back_as_the_definition_that_it_was_written_from() -> None:
    for definition in crd.all_definitions().values():
        assert yaml.safe_load(crd.render(definition)) == definition


def test_check_fails_on_a_stale_file_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["crd", str(tmp_path)])
    assert crd.main() == 0
    stale = tmp_path / "moeprism.io_prismmodels.yaml"
    stale.write_text("edited by hand\n")
    monkeypatch.setattr("sys.argv", ["crd", "--check", str(tmp_path)])
    assert crd.main() == 1
    assert "run `make generate`" in capsys.readouterr().err
    assert stale.read_text() == "edited by hand\n"


@pytest.mark.parametrize("spec", [PrismServiceSpec, PrismModelSpec])
def test_every_field_of_a_typed_resource_is_in_its_schema(spec: type) -> None:
    properties = crd.structural(spec)["properties"]
    assert {field.alias for field in spec.model_fields.values()} == set(properties)
