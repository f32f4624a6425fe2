"""Traces: cutting, loading, and what the shipped slices are cut for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.demo import foresight, trace
from examples.demo.trace import Arrival, Cut, TraceError, cut, load, save

SOURCE = [Arrival(second / 4, 100 + second, 1 + second) for second in range(400)]


@given(st.floats(0, 90), st.floats(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_a_cut_is_thinned_in_order_and_never_stretched(start: float, span: float, keep: float, seed: int) -> None:
    kept = cut(SOURCE, Cut(start, span, keep, seed))
    times = [a.at_s for a in kept]
    assert times == sorted(times)
    original = [round(a.at_s - start, 3) for a in SOURCE if start <= a.at_s < start + span]
    assert set(times) <= set(original)


def test_the_same_cut_is_the_same_list_and_another_seed_another() -> None:
    first, again, other = (cut(SOURCE, Cut(10, 60, 0.5, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_lengths_are_clipped_to_the_embedded_models_window() -> None:
    kept = cut([Arrival(0, 7433, 900)], Cut(0, 1, 1.0, 0))
    assert kept == [Arrival(0, trace.MAX_PROMPT_TOKENS, trace.MAX_OUTPUT_TOKENS)]
    assert trace.MAX_PROMPT_TOKENS + trace.MAX_OUTPUT_TOKENS <= 512


def test_a_saved_trace_loads_as_it_was(tmp_path: Path) -> None:
    kept = cut(SOURCE, Cut(3, 20, 0.7, 5))
    save(kept, tmp_path / "trace.csv")
    assert load(tmp_path / "trace.csv") == kept


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("t_s,input_tokens\n0,1\n", "columns must be"),
        ("t_s,input_tokens,output_tokens\n", "holds no request"),
        ("t_s,input_tokens,output_tokens\n0,1,x\n", "line 2"),
        ("t_s,input_tokens,output_tokens\n0,0,1\n", "at least 1"),
        ("t_s,input_tokens,output_tokens\n5,1,1\n4,1,1\n", "must not fall"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_reason(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(TraceError, match=complaint):
        load(tmp_path / "bad.csv")


@pytest.mark.parametrize("path", [trace.SHIPPED, trace.SHIPPED_FAST], ids=lambda path: path.stem)
def test_a_shipped_burst_exceeds_one_replica_and_the_knob_absorbs_it(path: Path) -> None:
    """Fails when profile, artifact or floor change: cut the slice again so that it fits (examples/traces/README.md)."""
    arrivals, profile = load(path), foresight.read_profile("demo")
    held, elastic = (foresight.policy(profile, control) for control in ("Off", "Auto"))
    over = foresight.burst_over_capacity(arrivals, held, profile)
    assert over is not None
    assert foresight.OVER[0] <= over <= foresight.OVER[1]
    at_full = foresight.foresee(arrivals, held, profile).attainment()
    with_knob = foresight.foresee(arrivals, elastic, profile).attainment()
    assert with_knob >= 0.88
    assert with_knob >= at_full + 0.2


def test_the_full_slices_budget_falls_in_the_burst_and_before_the_second_replica() -> None:
    arrivals, profile = load(trace.SHIPPED), foresight.read_profile("demo")
    fleet = foresight.foresee(arrivals, foresight.policy(profile, "Auto"), profile)
    burst = foresight.burst_of([a.at_s for a in arrivals])
    lowered_s = foresight.lowered_s(fleet)
    second_s = next(tick.at_s for tick in fleet.ticks if tick.ready > 1)
    assert burst is not None
    assert lowered_s is not None
    assert burst.onset_s <= lowered_s < second_s
