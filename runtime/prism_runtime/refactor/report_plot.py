"""Pictures of an evaluation as SVG text: curves and heat maps. No scripts or fonts, colours by the page's classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 220, 12, 44
CELL_HEIGHT, LABEL_WIDTH = 22, 110
COLOURS = 10
"""Classes c0 to c9 of the page; the eleventh curve is drawn as the first, dashed."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, (x, y) ascending in x; `emphasis` draws it thicker than what it is compared with."""

    label: str
    points: Sequence[tuple[float, float]]
    emphasis: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Title with unit, and the values of its grid lines, ascending. A logarithmic axis needs positive ones."""

    title: str
    ticks: Sequence[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 at the first tick, 1 at the last."""
        low, high = self._scaled(self.ticks[0]), self._scaled(self.ticks[-1])
        return (self._scaled(value) - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return log10(value) if self.logarithmic else value


def decades(values: Iterable[float]) -> list[float]:
    """Powers of ten around positive values, at least two."""
    positive = [value for value in values if value > 0] or [1.0]
    low = floor(log10(min(positive)))
    return [10.0**power for power in range(low, max(low + 1, ceil(log10(max(positive)))) + 1)]


def even(low: float, high: float, step: float) -> list[float]:
    """Multiples of `step` that enclose low to high, at least two."""
    first = floor(low / step + 1e-9)
    last = max(first + 1, ceil(high / step - 1e-9))
    return [round(step * number, 10) for number in range(first, last + 1)]


def curves(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Curves with a legend on the right. Points outside of the axes are left out."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + (right - LEFT) * x.place(point[0]), bottom - (bottom - TOP) * y.place(point[1])

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y.ticks:
        height = bottom - (bottom - TOP) * y.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        across = LEFT + (right - LEFT) * x.place(tick)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    turned = f'transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y.title)}</text>')
    for number, each in enumerate(series):
        style = f"c{number % COLOURS}" + (" strong" if each.emphasis else "") + (" dashed" if number >= COLOURS else "")
        shown = [at(point) for point in each.points if _drawable(point, x, y)]
        path = " ".join(f"{across:.1f},{height:.1f}" for across, height in shown)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        parts += [
            f'<circle class="{style}" cx="{across:.1f}" cy="{height:.1f}" r="{3.5 if each.emphasis else 2.5}">'
            f"<title>{escape(each.label)}: {point[0]:g}, {point[1]:.4g}</title></circle>"
            for (across, height), point in zip(shown, [p for p in each.points if _drawable(p, x, y)], strict=True)
        ]
        line = TOP + 8 + 17 * number
        parts.append(f'<polyline class="{style}" points="{right + 14},{line} {right + 36},{line}"/>')
        parts.append(f'<text x="{right + 42}" y="{line + 4}">{escape(each.label)}</text>')
    return "".join([*parts, "</svg>"])


def heat_map(title: str, rows: Sequence[str], values: Sequence[Sequence[float]], x_title: str) -> str:
    """Shares of 0 to 1 as cells, dark where large; a row of `values` for each of `rows`, all of one length."""
    width = (WIDTH - LABEL_WIDTH) / max(1, len(values[0]) if values else 1)
    height = CELL_HEIGHT * len(rows) + 30
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = CELL_HEIGHT * number
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>')
        parts += [
            f'<rect class="cell" x="{LABEL_WIDTH + width * column:.1f}" y="{top}" width="{width - 1:.1f}" '
            f'height="{CELL_HEIGHT - 1}" fill-opacity="{min(1.0, max(0.0, share)):.3f}">'
            f"<title>{escape(name)}, {column}: {share:.3f}</title></rect>"
            for column, share in enumerate(row)
        ]
    middle = (WIDTH + LABEL_WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_title)}</text>')
    return "".join([*parts, "</svg>"])


def _drawable(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    if (x.logarithmic and point[0] <= 0) or (y.logarithmic and point[1] <= 0):
        return False
    return x.ticks[0] <= point[0] <= x.ticks[-1] and y.ticks[0] <= point[1] <= y.ticks[-1]
