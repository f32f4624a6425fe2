"""docs/api.md: generated, complete, and checked."""

from pathlib import Path

import pytest

from prism_api import reference
from prism_api.crd import all_definitions

DOCUMENT = Path(__file__).parents[3] / "docs/api.md"


def test_the_document_is_that_of_the_typed_resources() -> None:
    assert DOCUMENT.read_text() == reference.render(), "run `make generate`"


def test_every_field_and_every_rule_of_the_crds_is_in_the_reference() -> None:
    text = reference.render()
    for definition in all_definitions().values():
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for block in ("spec", "status"):
            for name, field in schema["properties"][block]["properties"].items():
                assert f"| `{name}` |" in text
                assert field["description"] in text
        for rule in schema["properties"]["spec"].get("x-kubernetes-validations", ()):
            assert rule["message"] in text


def test_the_reference_tells_bounds_defaults_and_choices() -> None:
    text = reference.render()
    assert "| `classes` | list, 1 to 8, by `name` | required |" in text
    assert "| `scaling.minReplicas` | integer, 0 to 1000 | `1` |" in text
    assert '| `budget.control` | `Auto`, `Fixed`, `Off` | `"Auto"` |' in text


def test_no_cell_of_a_table_breaks_its_row() -> None:
    rows = [line for line in reference.render().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.replace("\\|", "").count("|") != 5] == []


def test_check_fails_on_a_stale_document_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "api.md"
    assert reference.main([str(document)]) == 0
    assert reference.main(["--check", str(document)]) == 0
    document.write_text("edited by hand\n")
    assert reference.main(["--check", str(document)]) == 1
    assert "run `make generate`" in capsys.readouterr().err
    assert document.read_text() == "edited by hand\n"
