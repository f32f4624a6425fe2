"""The commands parse without loading torch, and say what is wrong with their arguments."""

import subprocess
import sys

import pytest

from prism_runtime.__main__ import build_parser


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
