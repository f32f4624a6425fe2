"""Flags and their environment variables; the command line starts without the heavy libraries."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from prism_runtime.engine.batching import POLICIES
from prism_runtime.server.settings import POLICY_NAMES, ServeSettings, add_serve_flags


def parse(*arguments: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, Path("/run/control.sock"))
    return ServeSettings.of(parser.parse_args(["artifact", *arguments]))


def test_flag_wins_over_variable_and_variable_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse().port == 8000
    monkeypatch.setenv("PRISM_PORT", "9000")
    assert parse().port == 9000
    assert parse("--port", "9001").port == 9001


def test_values_from_the_environment_are_converted_and_checked_like_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRISM_PACE_START_SECONDS", "12.5")
    monkeypatch.setenv("PRISM_TLS_DIR", "/tls")
    monkeypatch.setenv("PRISM_NO_PROFILE", "1")
    settings = parse()
    assert (settings.pace_start_seconds, settings.tls_dir, settings.no_profile) == (12.5, Path("/tls"), True)
    monkeypatch.setenv("PRISM_PORT", "70000")
    with pytest.raises(SystemExit):
        parse()
    assert "70000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "x"),
        ("--port", "-1"),
        ("--threads", "0"),
        ("--drain-seconds", "nan"),
        ("--log-level", "loud"),
        ("--policy", "lifo"),
        ("--shed-above", "0.5"),
    ],
)
def test_value_out_of_range_is_refused_with_the_range(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(f"{flag}={value}")
    assert f"argument {flag}: must be" in capsys.readouterr().err


def test_policies_that_can_be_chosen_are_those_that_there_are() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)
    assert parse().policy == POLICY_NAMES[0]
    assert parse("--policy", "fifo", "--shed-above", "3").shed_above == 3


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRISM_PACE", "")
    monkeypatch.setenv("PRISM_BOOT_POINT", "")
    assert (parse().pace, parse().boot_point) == (None, "full")


def test_boot_values_of_a_pod_come_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "SERVICE_NAMESPACE": "team-a",
        "SERVICE_NAME": "chat",
        "SERVICE_UID": "uid-1",
        "POD_NAME": "chat-0",
        "POD_UID": "uid-2",
        "IMAGE_DIGEST": "sha256:1",
        "ACCELERATOR": "h100",
        "CLASS_HEADER": "x-tier",
        "PACE": "demo",
        "PACE_START_SECONDS": "9",
        "BOOT_POINT": "b500",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"PRISM_{name}", value)
    settings = parse()
    assert [str(getattr(settings, name.lower())) for name in values] == [*list(values.values())[:9], "9.0", "b500"]


def test_local_control_without_a_path_is_the_users_own_socket() -> None:
    assert parse().local_control is None
    assert parse("--local-control").local_control == Path("/run/control.sock")
    assert parse("--local-control", "/x").local_control == Path("/x")


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["budget", "get", "--socket", "/nowhere"]])
def test_command_line_answers_without_loading_a_heavy_library(command: list[str]) -> None:
    code = (
        "import sys\n"
        "for heavy in ('torch', 'transformers', 'numpy', 'aiohttp'): sys.modules[heavy] = None\n"
        "from prism_runtime.__main__ import main\n"
        f"sys.exit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    if command[0] == "budget":
        assert done.returncode == 1
        assert "nothing serves at '/nowhere'" in done.stderr
    else:
        assert done.returncode == 0
        assert "PRISM_PORT" in done.stdout or "budget set b500" in done.stdout
