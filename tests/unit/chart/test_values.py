"""values.yaml, its schema and the README tell the same."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from tests.unit.chart.rendering import CHART

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
README = (CHART / "README.md").read_text()


def properties(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in node.get("properties", {}).items():
        inner = f"{path}.{name}" if path else name
        yield inner, child
        yield from properties(child, inner)
        yield from properties(child.get("items", {}), f"{inner}[]")


def leaves(node: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values as the README lists them: one row for what the schema does not open further."""
    for name, value in node.items():
        inner = f"{path}.{name}" if path else name
        child = schema["properties"][name]
        if "properties" in child:
            yield from leaves(value, child, inner)
        else:
            yield inner, value


def test_every_value_of_the_schema_is_described() -> None:
    assert [path for path, node in properties(SCHEMA) if len(node.get("description", "")) < 5] == []


def test_every_object_of_the_schema_is_closed() -> None:
    open_objects = [path for path, node in properties(SCHEMA) if "properties" in node and node["additionalProperties"]]
    assert open_objects == []
    assert SCHEMA["additionalProperties"] is False


def test_every_value_of_the_schema_has_a_default() -> None:
    wanted = {path for path, _ in properties(SCHEMA) if "[]" not in path} - {"global"}
    given = {path for path in wanted if has(VALUES, path.split("."))}
    assert given == wanted


def has(node: Any, keys: list[str]) -> bool:
    return not keys or (keys[0] in node and has(node[keys[0]], keys[1:]))


def test_the_readme_lists_every_value_with_its_default_and_meaning() -> None:
    described = dict(properties(SCHEMA))
    rows = [f"| `{p}` | `{json.dumps(v)}` | {described[p]['description']} |" for p, v in leaves(VALUES, SCHEMA)]
    assert len(rows) > 20
    assert [row for row in rows if row not in README] == []
    assert README.count("\n| `") == len(rows)
