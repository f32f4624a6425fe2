"""The tables of docs/evaluation.md, written from evidence/refactor.json and evidence/refactor_ablation.json alone.

python -m evidence.refactor_page            write them between the page's marks
python -m evidence.refactor_page --check    fail if they are not those of the files
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.figures import ROOT, load
from evidence.pages import command
from evidence.refactor_bytes import BATCHES, SELECTIONS

PAGE = ROOT / "docs" / "evaluation.md"
FIGURES = Path(__file__).with_name("refactor.json")
ABLATION = Path(__file__).with_name("refactor_ablation.json")
PROGRAM = "evidence.refactor_page"

QUALITY = {
    "kl.topk_over_prism.b750": "plain top-k's KL over ours at 75 % of the neurons",
    "kl.topk_over_prism.b500": "the same at 50 %",
    "kl.topk_over_prism.b250": "the same at 25 %",
    "kl.topk_over_prism.b500.d16": "at 50 %, sub-experts of 16 neurons in place of 8",
    "kl.paper_over_prism.b500": "the published method's KL over ours at 50 %, the better of both schedules",
    "kl.prism.b500": "our KL at 50 %",
    "kl.oracle.b500": "KL of a gate that knows the true norms, on our partition, at 50 %",
    "points.prism": "distinct, stable operating points of ours below full",
    "points.prism.candidates": "candidates that were offered",
    "points.prism.rises": "of these, pairs of neighbours in cost of which the dearer has the higher KL, before any fit",
    "points.topk": "of plain top-k",
    "points.paper": "of the published method",
    "drift.realised_error_permille": "largest error of the realised budget on unseen text, with the drift guard",
    "drift.unguarded_error_permille": "the same without it",
    "layer.olmoe_minutes": "time to refactor a layer of OLMoE's shape on two cores",
    "layer.olmoe_cpu_minutes": "processor time of the same, which a busy machine does not stretch",
    "layer.growth.experts": "that time with twice the experts, over the time of a few",
    "layer.growth.neurons": "with twice the neurons",
    "layer.growth.rows": "with twice the calibration rows that a search reads",
    "layer.growth.proposals": "with four times the proposals of a search",
}
DENSE = {
    "recipe": ("slices of 32 neurons by the recipe", "ppl", "realised"),
    "bare": ("the same without compensation", "ppl.bare", None),
    "neuron": ("neuron by neuron, after the whole gate projection", "ppl.neuron", None),
    "mix": ("slices first, then neurons of those that stay", "ppl.mix", "realised.mix"),
}
"""Ways to spend a budget on a dense model: what they are, and their figures' names after `smollm2.`."""
INGREDIENTS = {
    "partition": "partition",
    "gate": "gate",
    "metric": "metric",
    "compensation": "compensation",
    "allocation": "thresholds",
    "sub_experts": "N",
}

Json = Mapping[str, Any]


def tables() -> dict[str, list[str]]:
    """Lines of Markdown by the name of their mark."""
    figures = load(FIGURES)
    rows = json.loads(ABLATION.read_text()) if ABLATION.exists() else []
    return {
        "figures": figure_table(figures),
        "smollm2": dense_table(figures),
        "bytes": byte_table(figures),
        "ablation": ablation_table(rows),
    }


def figure_table(figures: Mapping[str, Json]) -> list[str]:
    """One line a figure; one that was not taken says so."""
    lines = ["| figure | value | 95 % interval | unit |", "| --- | ---: | ---: | --- |"]
    for name, meaning in QUALITY.items():
        figure = figures.get(name)
        if figure is None or figure["value"] is None:
            lines.append(f"| {meaning} (`{name}`) | {_cell(figure)} | | |")
            continue
        interval = "" if figure["low"] is None else f"{figure['low']:g} to {figure['high']:g}"
        lines.append(f"| {meaning} (`{name}`) | {figure['value']:g} | {interval} | {figure['unit']} |")
    return lines


def byte_table(figures: Mapping[str, Json]) -> list[str]:
    """One line a batch: what top-K/2 reads there, and its KL over that of every selection at those bytes."""
    lines = [
        f"| tokens a step | bytes that half of top-k reads | {' | '.join(SELECTIONS)} |",
        f"| ---: | ---: |{' ---: |' * len(SELECTIONS)}",
    ]
    for batch in BATCHES:
        names = ["topk_share", *(f"kl_topk_over.{selection}" for selection in SELECTIONS)]
        cells = [_cell(figures.get(f"bytes.b500.batch{batch}.{name}")) for name in names]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return lines


def dense_table(figures: Mapping[str, Json]) -> list[str]:
    """Perplexity of SmolLM2 by what is run of its neurons, and the budgets that were realised."""
    lines = [
        "| what runs | 75 % | realised, permille | 50 % | realised, permille |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| the whole model | {_cell(figures.get('smollm2.ppl.full'))} | | | |",
    ]
    for meaning, perplexity, realised in DENSE.values():
        cells = []
        for permille in (750, 500):
            cells.append(_cell(figures.get(f"smollm2.{perplexity}.b{permille}")))
            cells.append("" if realised is None else _cell(figures.get(f"smollm2.{realised}.b{permille}")))
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return lines


def ablation_table(rows: Sequence[Json]) -> list[str]:
    """One line a row of the ablation; what differs from the recipe is bold."""
    lines = [
        f"| {' | '.join(INGREDIENTS.values())} | KL, millinats | top-k's KL over it | seeds |",
        f"| {'--- | ' * len(INGREDIENTS)}---: | ---: | ---: |",
    ]
    recipe = next((row["ingredients"] for row in rows if row["id"] == "ablation.recipe"), {})
    for row in rows:
        said = [
            f"{row['ingredients'][name]}" if row["ingredients"][name] == recipe.get(name) else _bold(row, name)
            for name in INGREDIENTS
        ]
        over = row["topk_over"]
        lines.append(f"| {' | '.join(said)} | {_cell(row)} | {_cell(over)} | {len(row['seeds'])} |")
    return lines if rows else ["Not taken yet."]


def main(argv: Sequence[str] | None = None) -> int:
    return command(PROGRAM, __doc__, PAGE, tables, argv)


def _bold(row: Json, name: str) -> str:
    return f"**{row['ingredients'][name]}**"


def _cell(figure: Json | None) -> str:
    if figure is None or figure["value"] is None:
        return "not taken"
    value = f"{figure['value']:.2f}"
    return value if figure["low"] is None else f"{value} ({figure['low']:.2f} to {figure['high']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
