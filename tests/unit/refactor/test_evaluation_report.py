"""The table and the page of an evaluation."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from prism_runtime.refactor.report import page, table
from prism_runtime.refactor.report_plot import Axis, Series, curves, decades, even, heat_map


def row(family: str, name: str, permille: int, kl: float) -> dict[str, Any]:
    return {
        "family": family,
        "name": name,
        "nominalPermille": permille,
        "realisedPermille": float(permille),
        "relativeQuality": "0.9900",
        "relativeQualityLow": "0.9890",
        "kl": {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl, "median": kl, "p99": 4 * kl, "max": 9 * kl},
        "klByDomain": {"fiction": kl, "<go>": 2 * kl},
        "crossEntropy": {"value": 3.0, "low": 2.9, "high": 3.1},
        "perplexity": 20.09,
        "sameTop1": 0.9,
        "flips": {"lost": 0.01, "gained": 0.008},
        "topKOver": {"value": 9.4, "low": 9.1, "high": 9.7} if family == "artifact" else None,
        "realisedByLayer": [0.6, 0.4],
        "errorByLayer": {"sparse": [0.1, 0.2], "dense": [0.1, 0.1]},
        "energyByLayer": {"captured": [0.8, 0.9], "capturable": [0.95, 0.97]},
        "usageByDomain": {"fiction": [[0.9, 0.1], [0.7, 0.3]], "<go>": [[0.8, 0.2], [0.6, 0.4]]},
        "klBySequence": [kl, kl],
    }


ASSESSMENT: dict[str, Any] = {
    "artifact": "model <A>",
    "texts": ["held-out.jsonl"],
    "sequences": 2,
    "sequenceLength": 256,
    "rows": [
        row("artifact", "b500", 500, 0.005),
        row("artifact", "b750", 750, 0.001),
        row("top-k", "top-2", 500, 0.047),
        row("full", "top-4", 1000, 0.0),
    ],
    "points": {
        "artifact": {
            "candidates": 3,
            "hull": ["b500", "full"],
            "distinct": ["full"],
            "rises": 1,
            "largestRise": 0.002,
            "monotoneKl": [0.0, 0.1, 0.1],
        }
    },
    "stability": {"runs": 6, "stable": ["b750"], "points": ["b500", "b750"]},
    "steps": [
        {
            "stepTokens": 8,
            "points": [
                {"selection": "token", "name": "b500", "touchedShare": 0.8, "kl": 0.005},
                {"selection": "token", "name": "b750", "touchedShare": 0.93, "kl": 0.001},
                {"selection": "step", "name": "b500", "touchedShare": 0.5, "kl": 0.005},
                {"selection": "experts", "name": "top-2", "touchedShare": 0.7, "kl": 0.047},
            ],
            "topKOver": {"top-2": {"token": {"value": 6.5, "low": 6.1, "high": 6.9}}, "top-1": {}},
            "atShare": [
                {"touchedShare": 0.75, "kl": {"token": 0.006, "experts": 0.04}},
                {"touchedShare": 0.25, "kl": {}},
            ],
        }
    ],
}


class Tags(HTMLParser):
    """Collects tags and insists that every one is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_table_says_how_many_times_plain_top_k_is_worse_and_with_what_certainty() -> None:
    lines = table(ASSESSMENT).splitlines()
    assert lines[1].startswith("artifact b500")
    assert lines[1].endswith("9.4 (9.1-9.7)")
    assert re.search(r"500 +500.0 +0.00500 \(0.00450-0.00550\)", lines[1])
    assert lines[3].startswith("top-k  ")


def test_the_table_ranks_selections_at_a_share_of_bytes_and_says_where_none_was_measured() -> None:
    text = table(ASSESSMENT)
    assert "0.75  token 0.00600, experts 0.04000" in text
    assert "0.25  nothing measured on both sides" in text
    assert "KL of top-2 at the bytes it touches, divided by that of token 6.5 (6.1-6.9)" in text
    assert "KL of top-1" not in text


def test_table_and_page_give_both_costs_of_every_point_and_the_winner_at_a_share_of_bytes() -> None:
    text = table(ASSESSMENT)
    assert re.search(r"point +multiply-adds +bytes, steps of 8\n +b500 +0.500 +0.800\n +b750 +0.750 +0.930\n", text)
    assert re.search(r"share of bytes +steps of 8\n +0.75 +token\n +0.25 +none measured$", text)
    assert "<td>b500</td><td>0.500</td><td>0.800</td>" in page(ASSESSMENT)
    assert "<td>0.75</td><td>token</td>" in page(ASSESSMENT)


def test_table_and_page_name_the_stable_points_where_that_was_measured() -> None:
    said = "1 of 2 points below full keep order and cost in all 6 runs over seeds and texts: b750"
    assert said in table(ASSESSMENT)
    assert said in page(ASSESSMENT)
    assert "keep order" not in table(ASSESSMENT | {"stability": None})


def test_without_steps_nothing_is_said_of_bytes() -> None:
    alone = ASSESSMENT | {"steps": []}
    assert "bytes" not in table(alone)
    assert "both costs" not in page(alone).lower()


def test_table_and_page_count_operating_points_and_admit_rises() -> None:
    said = (
        "artifact: 3 candidates, 2 on the lower convex hull, 1 distinct; "
        "KL that rises with budget: 1 (at most 0.002 nats)"
    )
    assert said in table(ASSESSMENT)
    assert said in page(ASSESSMENT)


def test_the_page_is_closed_escapes_names_and_loads_nothing() -> None:
    text = page(ASSESSMENT)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "<go>" not in text
    assert "model &lt;A&gt;" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}


def test_the_page_draws_quality_allocation_captured_energy_usage_and_bytes() -> None:
    tags = Tags()
    tags.feed(page(ASSESSMENT))
    drawn = [attributes["aria-label"] for tag, attributes in tags.seen if tag == "svg"]
    assert drawn == [
        "KL against realised budget",
        "Realised budget by layer",
        "Captured energy by layer",
        "Sub-expert usage by domain",
        "Weight bytes in decode steps of 8 tokens",
    ]


def test_an_assessment_survives_json() -> None:
    assert page(json.loads(json.dumps(ASSESSMENT))) == page(ASSESSMENT)


def test_a_smaller_kl_is_drawn_lower_on_a_logarithmic_axis() -> None:
    axis = Axis("KL", [0.001, 0.01, 0.1], logarithmic=True)
    assert [axis.place(value) for value in (0.001, 0.01, 0.1)] == pytest.approx([0.0, 0.5, 1.0])


def test_points_that_a_logarithmic_axis_cannot_hold_are_left_out() -> None:
    drawn = curves("x", Axis("b", [0.0, 1.0]), Axis("KL", [0.01, 1.0], True), [Series("a", [(0.5, 0.1), (1.0, 0.0)])])
    assert drawn.count("<circle") == 1


def test_ticks_enclose_what_is_drawn() -> None:
    assert decades([0.003, 0.2]) == pytest.approx([0.001, 0.01, 0.1, 1.0])
    assert even(0, 0.9, 0.25) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert even(0, 0, 1) == [0, 1]


def test_a_cell_is_as_opaque_as_its_share() -> None:
    drawn = heat_map("usage", ["a"], [[0.25, 1.5]], "sub-expert")
    assert re.findall(r'fill-opacity="([\d.]+)"', drawn) == ["0.250", "1.000"]
