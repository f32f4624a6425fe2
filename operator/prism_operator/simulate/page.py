"""Results as one HTML file that needs nothing else: tables, plots, and runs over time, as inline SVG."""

import html
import statistics
from collections.abc import Mapping, Sequence

from prism_operator.plan.fleet import Caps
from prism_operator.plan.types import ServicePolicy
from prism_operator.simulate.fleet import Sample
from prism_operator.simulate.report import COLUMNS, cells
from prism_operator.simulate.score import Score
from prism_operator.simulate.services import Together
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
    """The whole document of one service under several policies; text from outside is escaped."""
    body = [
        "<h2>Means over seeds</h2>",
        _table("policy", results.scores),
        "<h2>Attainment against replica-hours</h2><p>Up and to the left is better. Bars: 95 % intervals.</p>",
        _pareto(results),
        "<h2>Over time, first seed</h2>",
        *(_timeline(name, samples, policy) for name, samples in results.samples.items()),
    ]
    return _document(title, facts, body)


def services_page(
    scores: Mapping[str, Sequence[Score]], run: Together, caps: Caps, title: str, facts: Mapping[str, object]
) -> str:
    """The whole document of several services under shared caps. `run`: the one whose course is shown."""
    body = [
        "<h2>Means over seeds</h2>",
        _table("service", scores),
        "<h2>What they hold together, first seed</h2>",
        *_shares(run, caps),
        "<h2>Over time, first seed</h2>",
        *(_timeline(one.name, fleet.samples, one.study.policy) for one, _, fleet in run.parts),
    ]
    return _document(title, facts, body)


def _document(title: str, facts: Mapping[str, object], body: Sequence[str]) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><ul>",
        *(f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in facts.items()),
        "</ul>",
        *body,
        "<p>Simulated, not measured on a cluster: see the assumptions in the command's --help.</p></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(heading: str, scores: Mapping[str, Sequence[Score]]) -> str:
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in COLUMNS)
    rows = [
        f"<tr{' class=prism' if name == 'prism' else ''}><td>{html.escape(name)}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells(runs))
        + "</tr>"
        for name, runs in scores.items()
    ]
    return f"<div class=scroll><table><tr><th>{heading}</th>{head}</tr>{''.join(rows)}</table></div>"


def _shares(run: Together, caps: Caps) -> list[str]:
    """One plot for each cap; without caps one of replicas, which then share nothing."""
    drawn = []
    if caps.accelerators is not None:
        weights = [float(one.accelerators) for one in run.members]
        drawn.append(_stack(run, weights, float(caps.accelerators), "accelerators ordered"))
    if caps.per_hour is not None:
        weights = [float(one.study.policy.price_per_hour or 0) for one in run.members]
        drawn.append(_stack(run, weights, float(caps.per_hour), "cost an hour of what is ordered"))
    return drawn or [_stack(run, [1.0] * len(run.members), None, "replicas ordered")]


def _stack(run: Together, weights: Sequence[float], cap: float | None, what: str) -> str:
    """Services on top of one another over time, in order of the command line; dashed: the cap."""
    by_second = list(zip(*(fleet.samples for fleet in run.fleets), strict=True))
    thin = by_second[:: max(1, len(by_second) // MOST_DOTS)]
    levels = [[0.0] * len(thin)]
    for place, weight in enumerate(weights):
        held = [weight * samples[place].provisioned for samples in thin]
        levels.append([below + more for below, more in zip(levels[-1], held, strict=True)])
    axes = _Axes((0, thin[-1][0].at_s), (0, max([cap or 0.0, *levels[-1]]) * 1.05))
    times = [samples[0].at_s for samples in thin]
    parts = [axes.frame("seconds", what + ("; dashed: the cap" if cap is not None else ""))]
    for number, (member, below, above) in enumerate(zip(run.members, levels, levels[1:], strict=False)):
        colour = COLOURS[number % len(COLOURS)]
        edge = [*axes.stairs(times, above), *reversed(axes.stairs(times, below))]
        parts.append(f"<polygon points='{' '.join(edge)}' fill='{colour}' fill-opacity=0.75 />")
        line = TOP + 14 * number
        parts.append(f"<rect x={LEFT + 8} y={line} width=9 height=9 fill='{colour}' stroke='#fff'/>")
        parts.append(f"<text x={LEFT + 22} y={line + 9}>{html.escape(member.name)}</text>")
    if cap is not None:
        (x, y), (end, _) = axes.at(0, cap), axes.at(times[-1], cap)
        parts.append(f"<line x1={x:.1f} x2={end:.1f} y1={y:.1f} y2={y:.1f} stroke='#111' stroke-dasharray='4 3'/>")
    return f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='{html.escape(what)}'>{''.join(parts)}</svg>"


class _Axes:
    """Data to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: float = HEIGHT) -> None:
        self.x, self.y, self.height = x, y, height

    def at(self, x: float, y: float) -> tuple[float, float]:
        share_x = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        share_y = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + share_x * (WIDTH - LEFT - 20), self.height - BOTTOM - share_y * (self.height - BOTTOM - TOP)

    def stairs(self, xs: Sequence[float], ys: Sequence[float]) -> list[str]:
        """Corners of a line that keeps each value until the next."""
        corners: list[str] = []
        for x, y in zip(xs, ys, strict=True):
            px, py = self.at(x, y)
            if corners:
                corners.append(f"{px:.1f},{corners[-1].split(',')[1]}")
            corners.append(f"{px:.1f},{py:.1f}")
        return corners

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
        corners = axes.stairs([sample.at_s for sample in thin], values)
        return f"<polyline points='{' '.join(corners)}' fill=none stroke='{colour}' stroke-dasharray='{dash}'/>"

    budget = [statistics.fmean(budgets[point] for point in sample.points) / 1000 * most for sample in thin]
    body = axes.frame("seconds", "replicas; dashed: ordered; green: budget (top = full)")
    body += curve([sample.provisioned for sample in thin], "#999", "4 3")
    body += curve([sample.ready for sample in thin], "#2a78d6") + curve(budget, "#0b6e4f")
    return f"<h3>{html.escape(name)}</h3><svg width={WIDTH} height={height} role=img>{body}</svg>"
