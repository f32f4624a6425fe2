"""Small time plots as SVG text: lines or steps over seconds, axes with units, a shaded span. No scripts, no fonts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 210
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Line:
    """Values over time; None breaks the line. `step` holds each value until the next, as counts and settings do."""

    label: str
    css_class: str
    points: Sequence[tuple[float, float | None]]
    step: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture. `floor` and `ceiling` widen the y axis; `limit` draws a labelled level, as an objective is."""

    title: str
    y_label: str
    lines: Sequence[Line]
    x_max: float
    shaded: tuple[float, float] | None = None
    floor: float = 0.0
    ceiling: float = 0.0
    limit: tuple[float, str] | None = None


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values from `low` to at least `high`, about `wanted` of them."""
    span = max(high - low, 1e-9)
    magnitude = 10.0 ** len(str(int(span / wanted))) / 10 if span >= wanted else 1.0
    while span / wanted < magnitude:
        magnitude /= 10
    step = next(s * magnitude for s in TICK_STEPS if s * magnitude * wanted >= span)
    first = step * (low // step)
    count = 1
    while first + step * count < high - 1e-9:
        count += 1
    return [round(first + step * index, 10) for index in range(count + 1)]


def svg(plot: Plot) -> str:
    """The picture as an <svg> element; colours come from the page's classes."""
    values = [value for line in plot.lines for _, value in line.points if value is not None]
    limit = [plot.limit[0]] if plot.limit else []
    y_ticks = ticks(plot.floor, max([plot.ceiling, *values, *limit]), 4)
    x_ticks = ticks(0, plot.x_max, 8)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(at_s: float) -> float:
        return LEFT + (right - LEFT) * at_s / plot.x_max

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">']
    if plot.shaded:
        start, end = plot.shaded
        parts.append(
            f'<rect class="burst" x="{x(start):.1f}" y="{TOP}" width="{x(end) - x(start):.1f}" '
            f'height="{bottom - TOP}"/><text class="burst-label" x="{x(start) + 4:.1f}" y="{TOP + 12}">burst</text>'
        )
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        if value <= plot.x_max:
            parts.append(
                f'<text class="tick" x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
            )
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="axis" x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">time, s</text>')
    parts.append(
        f'<text class="axis" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.y_label)}</text>"
    )
    if plot.limit:
        level, label = plot.limit
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(
            f'<text class="limit-label" x="{right - 4}" y="{y(level) - 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for line in plot.lines:
        for run in _runs(line):
            path = " ".join(f"{x(at_s):.1f},{y(value):.1f}" for at_s, value in run)
            parts.append(
                f'<polyline class="{line.css_class}" points="{path}"><title>{escape(line.label)}</title></polyline>'
            )
    return "".join([*parts, "</svg>"])


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """Unbroken stretches of a line; a step line gets a corner before every change."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at_s, value in line.points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at_s, value))
    if line.step:
        runs = [_cornered(run) for run in runs]
    return [run for run in runs if run]


def _cornered(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    corners = [point for (_, held), (at_s, value) in pairwise(run) for point in ((at_s, held), (at_s, value))]
    return [*run[:1], *corners]
