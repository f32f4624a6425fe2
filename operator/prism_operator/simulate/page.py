"""Results as one HTML file that needs nothing else: table, Pareto plot, and runs over time, as inline SVG."""

import html
import statistics
from collections.abc import Mapping, Sequence

from prism_operator.plan.types import ServicePolicy
from prism_operator.simulate.fleet import Sample
from prism_operator.simulate.report import COLUMNS, cells
from prism_operator.simulate.study import Results, interval

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 320, 60, 40, 15
MOST_DOTS = 600
"""Points of a curve; more would only make the file long."""
COLOURS = ("#0b6e4f", "#2a78d6", "#d98a1b", "#a23b72", "#52514e", "#1baf7a", "#c73e1d", "#6a4c93")
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; color: #111; background: #fcfcfb }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 2px 9px; text-align: right }
th { font-weight: 600; border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
tr.prism { background: #e4f2ec } .scroll { overflow-x: auto } svg text { font: 11px system-ui, sans-serif }
"""


def page(results: Results, policy: ServicePolicy, title: str, facts: Mapping[str, object]) -> str:
    """The whole document; text from outside is escaped."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><ul>",
        *(f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in facts.items()),
        "</ul><h2>Means over seeds</h2>",
        _table(results),
        "<h2>Attainment against replica-hours</h2><p>Up and to the left is better. Bars: 95 % intervals.</p>",
        _pareto(results),
        "<h2>Over time, first seed</h2>",
        *(_timeline(name, samples, policy) for name, samples in results.samples.items()),
        "<p>Simulated, not measured on a cluster: see the assumptions in the command's --help.</p></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(results: Results) -> str:
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in COLUMNS)
    rows = [
        f"<tr class={html.escape(name)}><td>{html.escape(name)}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells(runs))
        + "</tr>"
        for name, runs in results.scores.items()
    ]
    return f"<div class=scroll><table><tr><th>policy</th>{head}</tr>{''.join(rows)}</table></div>"


class _Axes:
    """Data to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: float = HEIGHT) -> None:
        self.x, self.y, self.height = x, y, height

    def at(self, x: float, y: float) -> tuple[float, float]:
        share_x = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        share_y = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + share_x * (WIDTH - LEFT - 20), self.height - BOTTOM - share_y * (self.height - BOTTOM - TOP)

    def frame(self, x_title: str, y_title: str) -> str:
        parts = []
        for n in range(5):
            x, y = (low + (high - low) * n / 4 for low, high in (self.x, self.y))
            px, py = self.at(x, y)
            parts.append(f"<line x1={LEFT} x2={WIDTH - 20} y1={py:.1f} y2={py:.1f} stroke='#e3e2dc'/>")
            parts.append(f"<text x={LEFT - 6} y={py + 4:.1f} text-anchor=end>{y:.4g}</text>")
            parts.append(f"<text x={px:.1f} y={self.height - BOTTOM + 16} text-anchor=middle>{x:.4g}</text>")
        parts.append(f"<text x={WIDTH / 2} y={self.height - 6} text-anchor=middle>{html.escape(x_title)}</text>")
        parts.append(f"<text x=4 y=11>{html.escape(y_title)}</text>")
        return "".join(parts)


def _pareto(results: Results) -> str:
    marks = {
        name: (interval([r.replica_hours for r in runs]), interval([r.attainment * 100 for r in runs]))
        for name, runs in results.scores.items()
    }
    hours = [hours[0] for hours, _ in marks.values()]
    kept = [share[0] for _, share in marks.values()]
    margin = max(0.05 * (max(hours) - min(hours)), 0.01)
    axes = _Axes((min(hours) - margin, max(hours) + margin), (max(0.0, min(kept) - 2), 100.5))
    parts = [axes.frame("replica-hours", "attainment, %")]
    for number, (name, (hour, share)) in enumerate(marks.items()):
        x, y = axes.at(hour[0], share[0])
        colour = COLOURS[number % len(COLOURS)]
        top, bottom = axes.at(hour[0], min(100.0, share[2]))[1], axes.at(hour[0], max(axes.y[0], share[1]))[1]
        parts.append(f"<line x1={x:.1f} x2={x:.1f} y1={top:.1f} y2={bottom:.1f} stroke='{colour}'/>")
        parts.append(f"<circle cx={x:.1f} cy={y:.1f} r={6 if name == 'prism' else 4} fill='{colour}'/>")
        parts.append(f"<text x={x + 8:.1f} y={y + 4 + 11 * (number % 2):.1f}>{html.escape(name)}</text>")
    return f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='Pareto plot'>{''.join(parts)}</svg>"


def _timeline(name: str, samples: Sequence[Sample], policy: ServicePolicy) -> str:
    if not samples:
        return ""
    thin = samples[:: max(1, len(samples) // MOST_DOTS)]
    height = 190
    most = max(sample.existing for sample in samples)
    axes = _Axes((0, samples[-1].at_s), (0, most + 0.5), height)
    budgets = {point.name: point.budget_permille for point in policy.ladder.points}

    def curve(values: Sequence[float], colour: str, dash: str = "") -> str:
        dots: list[str] = []
        for sample, value in zip(thin, values, strict=True):
            x, y = axes.at(sample.at_s, value)
            dots.append(f"{x:.1f},{dots[-1].split(',')[1]} {x:.1f},{y:.1f}" if dots else f"{x:.1f},{y:.1f}")
        return f"<polyline points='{' '.join(dots)}' fill=none stroke='{colour}' stroke-dasharray='{dash}'/>"

    budget = [statistics.fmean(budgets[point] for point in sample.points) / 1000 * most for sample in thin]
    body = axes.frame("seconds", "replicas; dashed: ordered; green: budget (top = full)")
    body += curve([sample.provisioned for sample in thin], "#999", "4 3")
    body += curve([sample.ready for sample in thin], "#2a78d6") + curve(budget, "#0b6e4f")
    return f"<h3>{html.escape(name)}</h3><svg width={WIDTH} height={height} role=img>{body}</svg>"
