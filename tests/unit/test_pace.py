"""Pace and its shipped profile; load signals; fits of measured profiles. No engine, no waiting."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_runtime.engine.pace import PaceError, Pacer, load_profile
from prism_runtime.engine.profiling import Limits, StepSample, _shapes, fit_point
from prism_runtime.engine.signals import LoadSignals
from prism_runtime.engine.types import Finished, FinishReason, Plan, Request, Sampling, StepReport, Token
from tests.unit.test_governor import NAMES, make_ladder


def report(decode: dict[int, int], context: int = 0, prefill: dict[int, int] | None = None) -> StepReport:
    return StepReport((), Plan(1, (0,)), decode, context, prefill or {})


# -- the shipped profile ------------------------------------------------------------------------------------------


def test_demo_profile_is_linear_in_the_budget_and_1_6_times_faster_at_half_of_it() -> None:
    profile = load_profile("demo")
    full, half = (profile.points[name].step_seconds(8, 0, 0) for name in ("full", "b500"))
    assert full == pytest.approx(0.030 + 8 * 0.003)
    assert full / half == pytest.approx(1.6)
    steps = [profile.points[name].step_seconds(16, 0, 256) for name in NAMES]
    rises = [upper - lower for lower, upper in pairwise(steps)]
    assert rises == pytest.approx([(steps[-1] - steps[0]) / 4] * 4, rel=1e-3)


def test_demo_profile_says_that_it_was_made_up() -> None:
    profile = load_profile("demo")
    assert profile.accelerator == "demo-gpu"
    assert "Made up" in profile.provenance
    assert (profile.max_sequences, profile.prefill_tokens_per_step, profile.kv_tokens) == (16, 256, 16384)


def test_unknown_profile_is_refused_with_the_shipped_names() -> None:
    with pytest.raises(PaceError, match=r"no profile 'h100'.*\(demo\)"):
        load_profile("h100")


def test_profile_is_read_from_a_path_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(load_profile("demo").to_wire()))
    assert load_profile(str(path)) == load_profile("demo")
    path.write_text("{}")
    with pytest.raises(PaceError, match="cannot be read"):
        load_profile(str(path))


def test_profile_without_a_point_of_the_model_cannot_pace_it() -> None:
    profile = load_profile("demo")
    lacking = profile.model_copy(update={"points": {"full": profile.points["full"]}})
    with pytest.raises(PaceError, match="b500, b625, b750, b875"):
        Pacer(lacking, make_ladder())


def test_a_sequence_costs_what_its_own_point_costs_and_the_base_that_of_the_costliest_in_the_step() -> None:
    pacer = Pacer(load_profile("demo"), make_ladder())
    cheap, dear, mixed = (pacer.step_s(report(at)) for at in ({0: 4}, {4: 4}, {0: 2, 4: 2}))
    half, full = (load_profile("demo").points[name] for name in ("b500", "full"))
    saved = full.step_per_sequence_nanoseconds - half.step_per_sequence_nanoseconds
    assert dear - mixed == pytest.approx(2e-9 * saved)
    assert cheap < mixed
    tokens = 100 * half.prefill_per_token_nanoseconds + 50 * full.prefill_per_token_nanoseconds
    assert pacer.step_s(report({}, prefill={0: 100, 4: 50})) == pytest.approx(
        1e-9 * (full.step_base_nanoseconds + tokens)
    )
    assert pacer.step_s(report({})) == 0


def test_step_slower_than_the_pace_is_counted_as_lag_and_not_caught_up() -> None:
    pacer = Pacer(load_profile("demo"), make_ladder())
    assert pacer.rest_s(0.030, 0.010) == pytest.approx(0.020)
    assert pacer.rest_s(0.030, 0.050) == 0
    assert pacer.rest_s(0.030, 0.010) == pytest.approx(0.020)
    assert (pacer.lagging_steps, pacer.lag_s) == (1, pytest.approx(0.020))


# -- measured profiles --------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(0, 50_000_000)] * 5).filter(lambda costs: costs[0] > 1_000_000))
def test_fit_finds_the_costs_that_made_the_samples(costs: tuple[int, int, int, int, int]) -> None:
    base, sequence, kilotoken, prefill_base, prefill_token = (cost * 1e-9 for cost in costs)
    samples = []
    for sequences in (0, 1, 4, 16):
        for context in (0, 100, 2000) if sequences else (0,):
            for prefill in (0, 16, 170, 256):
                seconds = base + sequence * sequences + kilotoken * context / 1000 + prefill_token * prefill
                samples.append(StepSample(sequences, context, prefill, seconds + (prefill_base if prefill else 0)))
    fit = fit_point(samples)
    assert fit.fit_error_permille == 0
    for sample in samples:
        predicted = fit.step_seconds(sample.decode_sequences, sample.context_tokens, sample.prefill_tokens)
        assert predicted == pytest.approx(sample.seconds, rel=1e-4)


def test_fit_tells_the_steps_that_make_most_tokens_from_those_that_read_prompts() -> None:
    """A step that also reads a prompt takes ten times one that does not, and more than the formula can say: by seconds
    the long ones would decide alone, and steps that only decode would seem a third dearer than they are."""
    samples = [StepSample(b, 100 * b, 0, 0.002 + 0.0001 * b) for b in (1, 4, 8, 16)]
    samples += [StepSample(b, 100 * b, 256, 0.015 + (0.009 if b % 8 else 0.0)) for b in (1, 4, 8, 16)]
    fit = fit_point(samples)
    for one in samples[:4]:
        predicted = fit.step_seconds(one.decode_sequences, one.context_tokens, 0)
        assert predicted == pytest.approx(one.seconds, rel=0.1)


def test_fit_of_noisy_steps_has_no_negative_cost_and_admits_its_error() -> None:
    samples = [StepSample(b, 1000, p, 0.010 - 0.0001 * b + 0.004 * (b % 2)) for b in (1, 2, 3, 4) for p in (0, 64)]
    fit = fit_point(samples)
    assert min(fit.step_per_sequence_nanoseconds, fit.step_base_nanoseconds, fit.prefill_per_token_nanoseconds) >= 0
    assert fit.fit_error_permille > 0


@pytest.mark.parametrize("limits", [Limits(16, 512, 512, 8192), Limits(1, 64, 16, 64), Limits(16, 512, 256, 1024)])
def test_measured_shapes_fit_the_engine(limits: Limits) -> None:
    shapes = _shapes(limits)
    assert shapes
    for sequences, prompt_tokens in shapes:
        assert sequences <= limits.max_sequences
        assert 0 < prompt_tokens < limits.max_context_tokens


# -- load signals -------------------------------------------------------------------------------------------------


def submit(signals: LoadSignals, request_id: str, class_name: str, now_s: float) -> None:
    signals.submitted(Request(request_id, (1,), Sampling(8)), class_name, now_s)


def test_wait_of_a_class_is_that_of_its_oldest_request_without_a_token() -> None:
    signals = LoadSignals()
    submit(signals, "a", "gold", 1.0)
    submit(signals, "b", "gold", 2.0)
    submit(signals, "c", "bulk", 3.0)
    assert signals.read(5.0)["gold"].queue_wait_s == 4.0
    signals.observe([Token("a", 1, 1, 0)], 5.0)
    assert signals.read(5.0)["gold"].queue_wait_s == 3.0
    assert signals.read(5.0)["bulk"].queue_wait_s == 2.0


def test_time_per_token_follows_recent_steps_and_ends_with_the_running_requests() -> None:
    signals = LoadSignals()
    submit(signals, "a", "gold", 0.0)
    for step in range(10):
        signals.observe([Token("a", 1, 1, 0)], 0.1 * step)
    assert signals.read(1.0)["gold"].tpot_s == pytest.approx(0.1)
    for step in range(40):
        signals.observe([Token("a", 1, 1, 0)], 1.1 + 0.2 * step)
    recent_s = signals.read(10.0)["gold"].tpot_s
    assert recent_s is not None
    assert 0.17 < recent_s < 0.2
    signals.observe([Finished("a", FinishReason.LENGTH)], 10.0)
    assert signals.read(10.0) == {}
    assert signals.in_flight() == []


def test_one_step_that_reads_a_long_prompt_shows_little_in_the_time_per_token() -> None:
    signals = LoadSignals()
    submit(signals, "a", "gold", 0.0)
    for now_s in (0.0, 0.1, 0.2, 0.7):
        signals.observe([Token("a", 1, 1, 0)], now_s)
    assert signals.read(1.0)["gold"].tpot_s == pytest.approx(0.12)


def test_refused_request_leaves_no_trace() -> None:
    signals = LoadSignals()
    submit(signals, "a", "gold", 0.0)
    signals.withdrawn("a")
    assert signals.read(9.0) == {}
