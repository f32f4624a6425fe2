"""What keeps `serve` from starting is one line that names the flag, and exit status 1."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism_runtime.server import serve as serving_command
from prism_runtime.server.app import read_eos_token_ids
from tests.runtime.serving.engine import ScriptedEngine
from tests.runtime.serving.process import default_settings


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """`serve` owns the process's logging; a test gives it back."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = before, level


def reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path, **settings: Any) -> str:
    """The reason that a start with these settings gives, on an artifact whose model is a scripted engine."""
    (artifact / "prism_manifest.json").write_text("{}")
    monkeypatch.setattr(serving_command, "load_engine", lambda *_, **__: ScriptedEngine())
    assert serving_command.serve(default_settings(artifact=artifact, no_profile=True, **settings)) == 1
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["message"] == "cannot serve"
    return str(line["reason"])


def test_local_control_beside_the_operators_port_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = reason(monkeypatch, capsys, tmp_path, tls_dir=tmp_path, local_control=tmp_path / "socket")
    assert "--local-control and --tls-dir exclude each other" in said


def test_unknown_boot_point_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = reason(monkeypatch, capsys, tmp_path, boot_point="b1")
    assert said == "unknown operating point 'b1'; known: b500, b750, full"


def test_unknown_pace_is_refused_with_the_shipped_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "shipped profiles (demo)" in reason(monkeypatch, capsys, tmp_path, pace="h100")


def test_accelerator_that_no_profile_may_be_named_after_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "found 'NVIDIA H100'" in reason(monkeypatch, capsys, tmp_path, accelerator="NVIDIA H100")


def test_port_in_use_is_refused_by_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in reason(monkeypatch, capsys, tmp_path, port=port)


def test_missing_artifact_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_command.serve(default_settings(artifact=tmp_path / "nowhere", no_profile=True)) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generation", "model", "ids"),
    [({"eos_token_id": 0}, {"eos_token_id": 9}, {0}), ({}, {"eos_token_id": [1, 2]}, {1, 2}), (None, {}, set())],
)
def test_end_of_text_comes_from_the_generation_config_else_the_models(
    tmp_path: Path, generation: dict[str, Any] | None, model: dict[str, Any], ids: set[int]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert read_eos_token_ids(tmp_path) == ids
