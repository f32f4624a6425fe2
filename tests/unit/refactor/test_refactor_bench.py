"""The benchmark of a layer measures what it says, at any shape."""

import json
from pathlib import Path

import pytest

from prism_runtime.refactor import bench


def test_every_row_is_written_with_its_shape_and_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "layer.json"
    small = "--experts 3 --neurons 16 --hidden 8 --routed 1 --tokens 80 --sub-experts 4 --proposals 200 --threads 1"
    monkeypatch.setattr("sys.argv", ["bench", *small.split(), "--json", str(target)])
    bench.main()
    report = json.loads(target.read_text())
    rows = report["measurements"]
    assert list(rows) == [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows["layer"]["shape"]["experts"] == 3
    assert rows["twice the neurons"]["shape"]["neurons"] == 32
    assert rows["four times the proposals"]["proposals"] == 800
    for row in rows.values():
        assert row["objective"] < row["start_objective"]


def test_only_the_layer_is_measured_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--experts 2 --neurons 16 --hidden 8 --routed 1 --tokens 80 --sub-experts 4 --layer-only"
    monkeypatch.setattr("sys.argv", ["bench", *small.split()])
    bench.main()
    assert len(capsys.readouterr().out.splitlines()) == 1
