"""An assessment for people: a table for the terminal, and one self-contained page with pictures."""

from collections.abc import Sequence
from html import escape
from typing import Any

from prism_runtime.refactor.report_plot import Axis, Series, curves, decades, even, heat_map

Json = dict[str, Any]

COLUMNS = (
    *("method", "budget", "realised", "KL", "95 %", "p99", "same top-1"),
    *("lost", "gained", "perplexity", "worst domain"),
)

POINT_SELECTIONS = ("token", "ranked prefix")
"""Of `refactor/subjects.py`: those of the artifact's own points."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --paper: #ffffff; --line: #d5dbe3; --heat: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --paper: #14181d; --line: #39424e; --heat: #6db3f2; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; } svg text { font-size: 12px; fill: var(--ink); }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.4; } .strong { stroke-width: 3; }
.dashed { stroke-dasharray: 4 3; } .cell { fill: var(--heat); } .wide { overflow-x: auto; }
""" + "".join(
    f".c{number} {{ stroke: {colour}; }} circle.c{number} {{ fill: {colour}; }}\n"
    for number, colour in enumerate(
        ("#0b62a8", "#c8102e", "#e07b00", "#2f8f4e", "#7a4fbf", "#8a6d3b", "#0fa3a3", "#c24b9b", "#6b7480", "#a3a300")
    )
)


def table(assessment: Json) -> str:
    """One line a method and budget, and below, where bytes were measured, the best selection at each share."""
    lines = [
        "method                          budget realised  KL, nats   (95 %)            p99  same top-1  "
        "perplexity  quality      low  top-k / this"
    ]
    for row in assessment["rows"]:
        kl = row["kl"]
        over = row["topKOver"]
        lines.append(
            f"{_label(row):31} {row['nominalPermille']:6} {row['realisedPermille']:8.1f} {kl['value']:9.5f} "
            f"({kl['low']:.5f}-{kl['high']:.5f}) {kl['p99']:7.3f} {row['sameTop1']:11.3f} {row['perplexity']:11.2f} "
            f"{row['relativeQuality']:>8} {row['relativeQualityLow']:>8}"
            + (f"  {over['value']:.1f} ({over['low']:.1f}-{over['high']:.1f})" if over else "")
        )
    lines += ["", "operating points, the full model among them"]
    lines += [f"  {line}" for line in [*_counts(assessment["points"]), *_stability(assessment["stability"])]]
    for step in assessment["steps"]:
        lines += [
            "",
            f"steps of {step['stepTokens']} tokens, KL at a share of the full model's weight bytes, best first",
        ]
        lines += [f"  {at['touchedShare']:.2f}  {_ranking(at['kl'])}" for at in step["atShare"]]
        lines += [f"  {line}" for line in _ratios(step)]
    if assessment["steps"]:
        lines += ["", "both costs of the operating points, as shares of the full model's"]
        lines += [f"  {line}" for line in _aligned(_both_costs(assessment))]
        lines += ["", "the selection with the lowest KL at a share of weight bytes"]
        lines += [f"  {line}" for line in _aligned(_winners(assessment["steps"]))]
    return "\n".join(lines)


def page(assessment: Json) -> str:
    """The HTML page; it loads nothing."""
    title = f"Evaluation of {assessment['artifact']}"
    measured = (
        f"{assessment['sequences']} sequences of {assessment['sequenceLength']} tokens from "
        f"{', '.join(assessment['texts'])}. Every cost is counted: kept neurons, gate, compensation. Intervals are "
        f"95 %, by a bootstrap over sequences. Oracles read outputs before they choose: they are bounds, not methods."
    )
    artifact = [row for row in assessment["rows"] if row["family"] == "artifact"]
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(measured)}</p>",
        "<h2>Quality against budget</h2>" + quality_curves(assessment["rows"]),
        "<h2>Every method</h2>" + _html_table(assessment["rows"]),
    ]
    if artifact:
        parts += [
            "<h2>Budget by layer</h2>" + _allocation(artifact),
            "<h2>Energy that the gate captures</h2><p>Share of the sub-experts' output energy that runs, and that the "
            "same number would hold if it were picked by true energy.</p>" + _captured(_middle(artifact)),
            f"<h2>Sub-experts by domain</h2><p>How often each sub-expert of a routed expert runs at "
            f"{escape(_middle(artifact)['name'])}, mean over layers; sub-experts in the order of their energy.</p>"
            + _usage(_middle(artifact)),
        ]
    said = [*_counts(assessment["points"]), *_stability(assessment["stability"])]
    counts = "".join(f"<li>{escape(line)}</li>" for line in said)
    parts.append(f"<h2>Operating points</h2><p>Full model included.</p><ul>{counts}</ul>")
    parts += [_steps(step) for step in assessment["steps"]]
    if assessment["steps"]:
        parts += [
            "<h2>Both costs of the operating points</h2><p>Shares of the full model's multiply-adds and weight bytes."
            "</p>" + _plain_table(_both_costs(assessment)),
            "<h2>Which selection wins where</h2><p>The one with the lowest KL at a share of the full model's weight "
            "bytes, among those measured on both sides of it.</p>" + _plain_table(_winners(assessment["steps"])),
        ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def quality_curves(rows: Sequence[Json]) -> str:
    """KL against realised budget, one curve a family, the artifact's on top."""
    families = dict.fromkeys(row["family"] for row in rows if row["kl"]["value"] > 0 and row["family"] != "full")
    series = [
        Series(
            family,
            sorted((row["realisedPermille"] / 1000, row["kl"]["value"]) for row in rows if row["family"] == family),
            emphasis=family == "artifact",
        )
        for family in families
    ]
    x = Axis("realised budget, share of the routed experts' neurons", even(0, 1, 0.25))
    y = Axis("KL to the full model, nats per token", decades(y for each in series for _, y in each.points), True)
    return curves("KL against realised budget", x, y, series)


def _allocation(rows: Sequence[Json]) -> str:
    series = [Series(row["name"], _by_layer(row["realisedByLayer"]), emphasis=row is _middle(rows)) for row in rows]
    return curves("Realised budget by layer", _layers(rows[0]), Axis("realised budget", even(0, 1, 0.25)), series)


def _captured(row: Json) -> str:
    energy = row["energyByLayer"]
    series = [Series(name, _by_layer(values)) for name, values in energy.items() if values]
    lowest = min((y for each in series for _, y in each.points), default=0.0)
    return curves("Captured energy by layer", _layers(row), Axis("share of energy", even(lowest, 1, 0.1)), series)


def _usage(row: Json) -> str:
    domains = list(row["usageByDomain"])
    means = [
        [sum(column) / len(column) for column in zip(*row["usageByDomain"][domain], strict=True)] for domain in domains
    ]
    return heat_map("Sub-expert usage by domain", domains, means, "sub-expert")


def _steps(step: Json) -> str:
    selections = dict.fromkeys(point["selection"] for point in step["points"])
    series = [
        Series(
            selection,
            sorted((p["touchedShare"], p["kl"]) for p in step["points"] if p["selection"] == selection),
            emphasis=selection == "step",
        )
        for selection in selections
    ]
    x = Axis("share of the full model's weight bytes that a step reads", even(0, 1, 0.25))
    y = Axis("KL to the full model, nats per token", decades(y for each in series for _, y in each.points), True)
    best = "".join(
        f"<tr><td>{at['touchedShare']:.2f}</td><td>{escape(_ranking(at['kl']))}</td></tr>" for at in step["atShare"]
    )
    title = f"Weight bytes in decode steps of {step['stepTokens']} tokens"
    return (
        f"<h2>{title}</h2>{curves(title, x, y, series)}"
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in _ratios(step))}</ul>"
        f"<table><tr><th>share of bytes</th><th>KL by selection, best first</th></tr>{best}</table>"
    )


def _both_costs(assessment: Json) -> list[list[str]]:
    """A heading and one line an operating point: its multiply-adds, and its bytes in steps of each size."""
    points = [row for row in assessment["rows"] if row["family"] == "artifact"]
    touched = [
        {point["name"]: point["touchedShare"] for point in step["points"] if point["selection"] in POINT_SELECTIONS}
        for step in assessment["steps"]
    ]
    heading = ["point", "multiply-adds", *(f"bytes, steps of {step['stepTokens']}" for step in assessment["steps"])]
    return [heading] + [
        [row["name"], f"{row['realisedPermille'] / 1000:.3f}", *(f"{each[row['name']]:.3f}" for each in touched)]
        for row in points
    ]


def _winners(steps: Sequence[Json]) -> list[list[str]]:
    """A heading and one line a share of bytes: the best selection in steps of each size."""
    shares = [at["touchedShare"] for at in steps[0]["atShare"]]
    found = [[next(iter(at["kl"]), "none measured") for at in step["atShare"]] for step in steps]
    return [["share of bytes", *(f"steps of {step['stepTokens']}" for step in steps)]] + [
        [f"{share:.2f}", *(names[index] for names in found)] for index, share in enumerate(shares)
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _plain_table(lines: Sequence[Sequence[str]]) -> str:
    heading, *body = lines
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _html_table(rows: Sequence[Json]) -> str:
    body = []
    for row in rows:
        kl, domains = row["kl"], row["klByDomain"]
        worst = max(domains, key=domains.__getitem__)
        cells = (
            _label(row),
            f"{row['nominalPermille']}",
            f"{row['realisedPermille']:.1f}",
            f"{kl['value']:.5f}",
            f"{kl['low']:.5f} to {kl['high']:.5f}",
            f"{kl['p99']:.3f}",
            f"{row['sameTop1']:.3f}",
            f"{row['flips']['lost']:.4f}",
            f"{row['flips']['gained']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{worst} {domains[worst]:.4f}",
        )
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heading = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return f'<div class="wide"><table><tr>{heading}</tr>{"".join(body)}</table></div>'


def _ratios(step: Json) -> list[str]:
    return [
        f"KL of {name} at the bytes it touches, divided by that of "
        + ", ".join(
            f"{selection} {each['value']:.1f} ({each['low']:.1f}-{each['high']:.1f})" for selection, each in found
        )
        for name, ratios in step["topKOver"].items()
        if (found := sorted(ratios.items(), key=lambda pair: -pair[1]["value"]))
    ]


def _counts(points: Json) -> list[str]:
    return [
        f"{family}: {each['candidates']} candidates, {len(each['hull'])} on the lower convex hull, "
        f"{len(each['distinct'])} distinct; KL that rises with budget: {each['rises']}"
        + (f" (at most {each['largestRise']:.2g} nats)" if each["rises"] else "")
        for family, each in points.items()
    ]


def _stability(found: Json | None) -> list[str]:
    """One line, or none if it was not measured."""
    if found is None:
        return []
    stable = ", ".join(found["stable"]) or "none"
    return [
        f"artifact: {len(found['stable'])} of {len(found['points'])} points below full keep order and cost in all "
        f"{found['runs']} runs over seeds and texts: {stable}"
    ]


def _label(row: Json) -> str:
    """Points have names of their own; of other methods the family and the budget say all."""
    return f"{row['family']} {row['name']}" if row["family"] == "artifact" else str(row["family"])


def _ranking(kl: dict[str, float]) -> str:
    return ", ".join(f"{selection} {value:.5f}" for selection, value in kl.items()) or "nothing measured on both sides"


def _middle(rows: Sequence[Json]) -> Json:
    """The point nearest to half the budget."""
    return min(rows, key=lambda row: abs(row["nominalPermille"] - 500))


def _by_layer(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(layer), value) for layer, value in enumerate(values)]


def _layers(row: Json) -> Axis:
    last = len(row["realisedByLayer"]) - 1
    return Axis("MoE layer", even(0, last, max(1, round(last / 8))))
