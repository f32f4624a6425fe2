"""The simulator's page quotes evidence/planner_pareto.json and evidence/planner_ablation.json."""

import pytest

from evidence.planner_page import main, table


def test_the_page_holds_the_rows_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_prism_is_first_and_what_dominates_it_is_bold() -> None:
    def cell(policy: str, attainment: float, *, better: bool = False) -> dict[str, object]:
        interval = [attainment, attainment, attainment]
        common = {"trace": "t", "replica_hours": [2.0, 2.0, 2.0], "relative_quality": 1.0}
        return common | {"policy": policy, "attainment": interval, "dominates_prism": better}

    rows = [cell("hpa", 0.5), cell("static", 0.99, better=True), cell("prism", 0.98)]
    assert [line.split(" | ")[1] for line in table(rows)[2:]] == ["prism", "**static**", "hpa"]
