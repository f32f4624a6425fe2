"""Published figures: a figure that could not be taken says why, and re-taking one keeps the others."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evidence import slice as evidence
from evidence.figures import NotTaken, absent, load, measured, merge

JUNIT = """<testsuites><testsuite>
<testcase name="test_full_budget_gives_the_logits_of_the_stock_model[olmoe]"/>
<testcase name="test_full_budget_gives_the_logits_of_the_stock_model[mixtral]"/>
<testcase name="test_continuous_batching_at_full_budget_gives_the_greedy_tokens_of_the_stock_model[olmoe]"/>
<testcase name="test_continuous_batching_at_full_budget_gives_the_greedy_tokens_of_the_stock_model[mixtral]">
<failure/></testcase>
<testcase name="test_an_invalid_manifest_is_refused_with_the_field_and_the_remedy[no objectives]"/>
<testcase name="test_an_invalid_manifest_is_refused_with_the_field_and_the_remedy[no name]"><skipped/></testcase>
</testsuite></testsuites>"""


class Taken(evidence.Runs):
    """Runs that were made before: cached properties take what they are given."""

    def __init__(self, **results: Any) -> None:
        super().__init__(Console(quiet=True))
        self.__dict__.update(results)


@pytest.fixture
def suite(tmp_path: Path) -> Taken:
    (tmp_path / "junit.xml").write_text(JUNIT)
    return Taken(tests=(61.0, evidence.outcomes(tmp_path / "junit.xml")))


def _demo(attainment: float | None, failed: int = 0) -> tuple[float, dict[str, Any]]:
    summary = {"attainment": attainment, "failed": failed, "ack_p99_s": 0.004}
    return 300.0, {"summaries": {"elastic": summary, "held": summary}}


def test_repeated_runs_give_the_mean_and_its_95_percent_interval() -> None:
    figure = evidence.collect("replay.attainment", Taken(demos=[_demo(0.9), _demo(0.99), _demo(0.97)]))
    # Standard deviation 0.04726 of three runs: 4.303 * 0.04726 / sqrt(3) = 0.1174.
    assert (figure.value, figure.low, figure.high) == (0.9533, 0.8359, 1.0)


def test_one_run_has_no_interval() -> None:
    figure = evidence.collect("replay.attainment", Taken(demos=[_demo(0.9)]))
    assert (figure.value, figure.low, figure.high) == (0.9, None, None)


def test_small_figures_keep_four_significant_digits_and_others_four_decimals() -> None:
    small = measured("kl", [0.0045231, 0.0045237], "nats a token", "how")
    assert small.value == 0.004523
    assert measured("ratio", [10.678432], "ratio", "how").value == 10.6784
    assert measured("none", [0.0], "requests", "how").value == 0


def test_a_run_that_did_not_show_a_figure_is_not_left_out_of_the_median() -> None:
    figure = evidence.collect("replay.attainment", Taken(demos=[_demo(0.9), _demo(None)]))
    assert figure.value is None
    assert "1 of 2 runs" in (figure.why or "")


def test_failed_requests_are_those_of_both_replays() -> None:
    figure = evidence.collect("replay.failed_requests", Taken(demos=[_demo(0.9, failed=2)]))
    assert figure.value == 4


def test_seconds_become_milliseconds_where_the_name_says_so() -> None:
    assert evidence.collect("replay.ack_p99_milliseconds", Taken(demos=[_demo(0.9)])).value == 4.0


def test_a_model_counts_as_equal_only_if_both_its_tests_passed(suite: Taken) -> None:
    assert evidence.collect("models.equal_at_full", suite).value == 1


def test_a_skipped_refusal_is_not_counted_as_refused(suite: Taken) -> None:
    assert evidence.collect("manifests.refused", suite).value == 1


def test_a_failed_test_leaves_the_time_of_the_suite_untaken_and_names_it(suite: Taken) -> None:
    figure = evidence.collect("test.warm_seconds", suite)
    assert figure.value is None
    assert "mixtral" in (figure.why or "")


def test_a_chaos_test_that_recorded_nothing_leaves_its_figure_untaken(
    suite: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    assert evidence.collect("node_kill.failed_requests", suite).value is None
    (tmp_path / "node_kill.json").write_text('{"failed_requests": 3}')
    assert evidence.collect("node_kill.failed_requests", suite).value == 3


def test_a_command_that_fails_is_no_figure_but_its_last_words() -> None:
    with pytest.raises(NotTaken, match=r"exit 7.*out of disk"):
        Taken().command(["sh", "-c", "echo out of disk; exit 7"])


def test_retaking_one_figure_keeps_the_others_in_order(tmp_path: Path) -> None:
    path, order = tmp_path / "slice.json", ("a", "b", "c")
    for name in ("c", "a"):
        merge(path, measured(name, [1.0], "s", "how"), order)
    merge(path, absent("c", "s", "how", "no disk"), order)
    assert [figure["id"] for figure in json.loads(path.read_text())] == ["a", "c"]
    assert load(path)["c"]["value"] is None
    assert load(path)["c"]["why"] == "no disk"
    assert load(path)["a"]["value"] == 1.0
    assert "why" not in load(path)["a"]


def test_every_figure_names_versions_and_how_it_was_taken(suite: Taken) -> None:
    figure = evidence.collect("models.equal_at_full", suite)
    assert figure.how.startswith("python -m pytest")
    assert {"commit", "python", "kubernetes", "torch"} <= figure.versions.keys()


def test_seeds_are_written_whatever_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    merge(path, measured("one", [1.0, 2.0], "s", "make", range(2)), ["one"])
    assert load(path)["one"]["seeds"] == [0, 1]
