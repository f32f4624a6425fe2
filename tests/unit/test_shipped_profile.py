"""An artifact's own profile spares the sweep at start, where it fits the engine and the machine."""

import json
from pathlib import Path

import pytest

from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.profiling import Limits, StepSample
from prism_runtime.engine.shipped_profile import FOLDER, corrected, read_shipped
from tests.runtime.serving.engine import ladder

LIMITS = Limits(max_sequences=8, max_context_tokens=64, prefill_tokens_per_step=32, kv_tokens=512)


def cost(base: int) -> PointProfile:
    return PointProfile(
        step_base_nanoseconds=base,
        step_per_sequence_nanoseconds=base // 10,
        step_per_kilotoken_nanoseconds=0,
        prefill_base_nanoseconds=0,
        prefill_per_token_nanoseconds=base // 100,
        fit_error_permille=7,
    )


def profile(**changes: object) -> Profile:
    points = {name: cost(base) for name, base in (("b500", 500_000), ("b750", 750_000), ("full", 1_000_000))}
    values = {
        "accelerator": "cpu",
        "provenance": "measured once",
        "max_sequences": 8,
        "kv_tokens": 512,
        "prefill_tokens_per_step": 32,
        "points": points,
    }
    return Profile(**(values | changes))


def ship(artifact: Path, text: str) -> None:
    (artifact / FOLDER).mkdir()
    (artifact / FOLDER / "cpu.json").write_text(text)


def test_profile_of_the_accelerator_is_read(tmp_path: Path) -> None:
    ship(tmp_path, json.dumps(profile().to_wire()))
    assert read_shipped(tmp_path, "cpu", LIMITS, ladder()) == profile()
    assert read_shipped(tmp_path, "h100", LIMITS, ladder()) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Invalid JSON"),
        (json.dumps(profile(points={"full": cost(1)}).to_wire()), "it has no cost for b500, b750"),
        (json.dumps(profile(max_sequences=16).to_wire()), "its max_sequences is 16, the engine's 8"),
        (json.dumps(profile(kv_tokens=99).to_wire()), "its kv_tokens is 99, the engine's 512"),
    ],
)
def test_profile_that_does_not_fit_the_engine_is_left_and_the_log_says_why(
    text: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ship(tmp_path, text)
    assert read_shipped(tmp_path, "cpu", LIMITS, ladder()) is None
    assert why in caplog.records[0].reason


def samples(factor: float) -> list[StepSample]:
    full = profile().points["full"]
    shapes = [(1, 16, 0), (8, 128, 0), (8, 136, 32)]
    return [StepSample(*shape, factor * full.step_seconds(*shape)) for shape in shapes]


def test_steps_at_full_correct_every_cost_and_are_told_in_the_provenance() -> None:
    found = corrected(profile(), profile().points["full"], samples(1.5))
    assert found is not None
    assert [point.step_base_nanoseconds for point in found.points.values()] == [750_000, 1_125_000, 1_500_000]
    assert found.points["full"].fit_error_permille == 7
    assert found.provenance == "measured once; costs times 1.50, as 3 steps at start took"


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_profile_of_another_kind_of_machine_is_not_believed(factor: float) -> None:
    assert corrected(profile(), profile().points["full"], samples(factor)) is None


def test_profile_without_any_cost_is_not_believed() -> None:
    assert corrected(profile(), cost(0), samples(1.0)) is None
