"""The report: one page that needs nothing else, and the same figures as JSON."""

import json
import re
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from examples.demo import report
from examples.demo.plot import Line, Plot, svg, ticks
from examples.demo.results import Episode, moment, summarise
from examples.demo.table import View
from tests.unit.demo.episodes import answer, burst_times, episode, pod, sample


def _episode(slow: bool) -> Episode:
    times = burst_times()
    point = "full" if slow else "b500"
    answers = [answer(t, ttft_s=3.0 if slow and t > 22 else 0.3, end_s=t + 4) for t in times]
    samples = [sample(t / 2, pods={"a": pod(point, {point: 40 * t}, waiting=t % 7)}) for t in range(150)]
    return episode(answers, samples)


@pytest.fixture(scope="module")
def episodes() -> dict[str, Episode]:
    return {report.ELASTIC: _episode(slow=False), report.HELD: _episode(slow=True)}


def test_the_page_loads_nothing_from_anywhere(episodes: dict[str, Episode]) -> None:
    page = report.as_page(episodes, {"machine": "2 cores"}, ["GPUs"])
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", page)


def test_every_picture_is_well_formed_and_names_its_axes(episodes: dict[str, Episode]) -> None:
    plots = report.plots(episodes)
    assert len(plots) == 8
    for plot in plots:
        texts = [element.text for element in ET.fromstring(svg(plot)).iter("text")]
        assert {"time, s", plot.y_label, "burst"} <= set(texts), plot.title


def test_the_page_says_what_the_knob_bought_and_what_it_does_not_show(episodes: dict[str, Episode]) -> None:
    page = report.as_page(episodes, {"trace": "a <slice>"}, ["GPUs are declared numbers"])
    assert "raised attainment" in page
    assert "GPUs are declared numbers" in page
    assert "a &lt;slice&gt;" in page


def test_json_and_page_tell_the_same_figures(episodes: dict[str, Episode], tmp_path: Path) -> None:
    page = report.write(tmp_path, episodes, {"machine": "2 cores"}, [])
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["summaries"]["elastic"]["attainment"] == summarise(episodes["elastic"]).attainment
    assert f"{document['summaries']['held']['attainment']:.1%}" in page.read_text()
    assert len(document["answers"]["held"]) == document["summaries"]["held"]["requests"]
    assert document["series"]["elastic"][10]["at_s"] == 10


@given(st.floats(0, 10), st.floats(0.001, 1e6), st.integers(2, 9))
def test_ticks_cover_the_values_and_are_not_too_many(low: float, span: float, wanted: int) -> None:
    found = ticks(low, low + span, wanted)
    assert found[0] <= low + 1e-6
    assert found[-1] >= low + span - 1e-6
    assert 2 <= len(found) <= 2 * wanted + 2


def test_a_gap_in_the_values_breaks_the_line() -> None:
    line = Line("x", "a", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 1.0)])
    assert svg(Plot("t", "y", [line], 4)).count("<polyline") == 2


def test_a_step_line_holds_each_value_until_the_next() -> None:
    drawing = ET.fromstring(svg(Plot("t", "y", [Line("x", "a", [(0, 1.0), (1, 3.0)], step=True)], 1)))
    (polyline,) = drawing.iter("polyline")
    first, corner, last = (point.split(",") for point in polyline.attrib["points"].split())
    assert (corner[0], corner[1]) == (last[0], first[1])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_view_works_with_and_without_a_terminal(terminal: bool) -> None:
    output = StringIO()
    shown = _episode(slow=False)
    with View(Console(file=output, force_terminal=terminal, width=100), "first replay", 55) as view:
        for second in range(12):
            view.show(moment(shown, float(second)))
    text = output.getvalue()
    assert "b500" in text
    if not terminal:
        assert len(text.splitlines()) == 3
