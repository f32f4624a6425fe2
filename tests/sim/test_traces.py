"""Trace files: every format, and what is said about a file that is none."""

import json
import statistics
from pathlib import Path

import pytest

from prism_operator.simulate.traces import Reading, TraceError, read

HOW = Reading("default")


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_requests_come_with_their_lengths_and_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "t_s,input_tokens,output_tokens,class\n0.5,10,3,batch\n0.1,20,4,\n")
    found = read(path, HOW)
    assert [(r.arrived_s, r.prompt_tokens, r.output_tokens, r.service_class) for r in found] == [
        (0.1, 20, 4, "default"),
        (0.5, 10, 3, "batch"),
    ]


def test_a_part_of_a_trace_begins_at_zero_and_lengths_are_clipped(tmp_path: Path) -> None:
    path = write(tmp_path, "t_s,input_tokens,output_tokens\n1,10,3\n5,9000,900\n9,10,3\n")
    (only,) = read(path, Reading("default", start_s=4, span_s=3, longest_prompt=4096, longest_output=512))
    assert (only.arrived_s, only.prompt_tokens, only.output_tokens) == (1, 4096, 512)


def test_arrivals_without_lengths_get_some(tmp_path: Path) -> None:
    found = read(write(tmp_path, "t_s\n" + "\n".join(str(n) for n in range(2000))), Reading("default", prompt=100))
    assert statistics.fmean(r.prompt_tokens for r in found) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("factor", [0.25, 2.5])
def test_a_factor_thins_or_multiplies_and_never_stretches(tmp_path: Path, factor: float) -> None:
    text = "t_s,input_tokens,output_tokens\n" + "\n".join(f"{n},10,3" for n in range(4000))
    found = read(write(tmp_path, text), Reading("default", factor=factor))
    assert len(found) == pytest.approx(4000 * factor, rel=0.1)
    assert found[-1].arrived_s == pytest.approx(4000, abs=40)


def test_equal_seeds_read_equal_requests_and_others_do_not(tmp_path: Path) -> None:
    path = write(tmp_path, "t_s,total_rps\n0,5\n600,5\n")
    assert read(path, HOW) == read(path, HOW)
    assert read(path, HOW) != read(path, Reading("default", seed=1))


def test_windows_of_rates_are_drawn_with_their_burstiness(tmp_path: Path) -> None:
    def counts(variation: float) -> list[int]:
        path = write(
            tmp_path, f"t_s,total_rps,mean_input_tokens,mean_output_tokens,rps_c7,cv_c7\n0,4,100,10,4,{variation}\n"
        )
        bins = [0] * 60
        for one in read(path, Reading("default", seed=3)):
            bins[int(one.arrived_s // 10)] += 1
        return bins

    calm, bursty = counts(1.0), counts(6.0)
    assert sum(calm) == pytest.approx(2400, rel=0.1)
    assert statistics.variance(bursty) > 4 * statistics.variance(calm)


def test_a_prometheus_range_is_summed_over_its_series(tmp_path: Path) -> None:
    series = [{"metric": {"pod": str(n)}, "values": [[1000 + 15 * k, "2"] for k in range(40)]} for n in range(3)]
    path = write(
        tmp_path, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": series}}), "p.json"
    )
    found = read(path, HOW)
    assert len(found) == pytest.approx(6 * 600, rel=0.1)
    assert 0 <= found[0].arrived_s < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "found ['a', 'b']"),
        ("t_s,input_tokens,output_tokens\n1,x,3\n", "line 2"),
        ('{"status": "error"}', "query_range"),
        ("t_s,total_rps\n0,0\n600,0\n", "no request"),
        ("t_s,total_rps\n0,many\n", "must be a number"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_what_would_work(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=r"trace\.csv") as refused:
        read(write(tmp_path, text), HOW)
    assert said in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read(tmp_path / "nowhere.csv", HOW)
