"""The commands parse without loading torch, and say what is wrong with their arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

from prism_runtime.__main__ import build_parser
from prism_runtime.refactor.request import UNSERVED_GATES, RecipeRefused, RefactorRequest


def test_building_the_parser_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from prism_runtime.__main__ import build_parser; build_parser(); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_points_are_parsed_as_per_mille() -> None:
    arguments = ["refactor", "m", "--calibration", "t", "--out", "o", "--points", "875,500"]
    assert build_parser().parse_args(arguments).points == [875, 500]


def test_points_that_are_no_integers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["refactor", "m", "--calibration", "t", "--out", "o", "--points", "half"])
    assert "must be integers separated by commas; found 'half'" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    return tmp_path, tmp_path / "text.txt"


@pytest.mark.parametrize("gate", UNSERVED_GATES)
def test_gates_that_no_kernel_runs_are_refused_with_the_reason_and_what_to_use(
    gate: str, files: tuple[Path, Path]
) -> None:
    with pytest.raises(RecipeRefused, match=rf"gate '{gate}' cannot be served: .*[Uu]se|--policy paper"):
        RefactorRequest(*files, gate=gate)


def test_a_gate_of_no_known_kind_is_refused_with_those_that_are(files: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeRefused, match="gate is one of ridge, pca, prior; found 'crystal ball'"):
        RefactorRequest(*files, gate="crystal ball")
