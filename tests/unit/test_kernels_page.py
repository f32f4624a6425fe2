"""The kernels page quotes evidence/gpu.json and evidence/runtime.json."""

import pytest

from evidence.kernels_page import CPU_ROWS, cpu_table, main, table


def figure(value: float) -> dict[str, object]:
    return {"value": value, "versions": {"torch": "9.9", "device": "H200"}}


def test_the_page_holds_the_figures_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_column_that_was_not_measured_for_some_tokens_is_empty_there() -> None:
    figures = {name: figure(1.4) for name in ("device.gigabytes_per_second", "t8.n4.full", "t1024.n4.full")}
    figures["t8.batched_mm.graph"] = figure(579.0)
    lines = table(figures)
    assert lines[0] == "Microseconds on one H200 (torch 9.9):"
    assert [line.split(" | ")[2:4] for line in lines[-2:]] == [["579", "1"], ["", "1"]]


def test_a_ratio_that_was_not_taken_says_why() -> None:
    taken = {"value": 1.456, "low": 1.4, "high": 1.512}
    absent = {"value": None, "low": None, "high": None, "why": "there is no C compiler here"}
    figures = dict.fromkeys(CPU_ROWS, taken) | {"layer.half_over_full.cpp": absent}
    lines = cpu_table(figures)
    assert "| there is no C compiler here |  | `layer.half_over_full.cpp` |" in lines[2]
    assert "| 1.46 | 1.40 to 1.51 |" in lines[3]
