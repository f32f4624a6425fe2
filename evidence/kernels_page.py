"""The tables of docs/kernels.md, written from evidence/gpu.json and evidence/runtime.json alone.

python -m evidence.kernels_page            write them between the page's marks
python -m evidence.kernels_page --check    fail if they are not those of the files
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.figures import ROOT, load
from evidence.pages import command

PAGE = ROOT / "docs" / "kernels.md"
FIGURES = Path(__file__).with_name("gpu.json")
CPU_FIGURES = Path(__file__).with_name("runtime.json")
PROGRAM = "evidence.kernels_page"
COLUMNS = {
    "grouped_mm.graph": "`grouped_mm`",
    "batched_mm.graph": "`batched_mm`",
    "n4.full": "full",
    "n4.b750": "75 %",
    "n4.b500": "50 %",
    "n4.b250": "25 %",
    "n4.threshold": "50 % by threshold",
    "floor.full": "floor, full",
    "floor.b500": "floor, 50 %",
}

CPU_ROWS = {
    "layer.half_over_full.cpp": "layer: time at half over full, prefix",
    "layer.half_over_full.torch": "the same in torch",
    "layer.threshold_over_full.t1": "half by threshold over full, 1 token",
    "layer.threshold_over_full.t8": "8 tokens",
    "layer.threshold_over_full.t32": "32 tokens",
    "layer.speedup_over_transformers.cpp": "layer: transformers' time over ours, full",
    "layer.two_threads.t1": "layer: one thread's time over two's, 1 token",
    "layer.two_threads.t8": "8 tokens",
    "layer.two_threads.t32": "32 tokens",
    "engine.over_generate.b8": "engine: tokens a second over those of `generate`, full, batch of 8",
    "engine.over_generate.b32": "batch of 32",
    "engine.over_continuous_batching.b8": "over those of transformers' continuous batching, batch of 8",
    "engine.over_continuous_batching.b32": "batch of 32",
    "engine.half_over_full": "engine: tokens a second at half over full, prefix",
}


def table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Microseconds by number of tokens; a column that was not measured for some tokens leaves them out."""
    versions = figures["device.gigabytes_per_second"]["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "device")
    tokens = sorted({int(name.split(".")[0][1:]) for name in figures if name.endswith("n4.full")})
    lines = [
        f"Microseconds on one {versions['device']} ({libraries}):",
        "",
        "| tokens | " + " | ".join(COLUMNS.values()) + " |",
        "| ---: |" + " ---: |" * len(COLUMNS),
    ]
    for count in tokens:
        cells = [figures.get(f"t{count}.{column}") for column in COLUMNS]
        lines.append(f"| {count} | " + " | ".join("" if c is None else f"{c['value']:.0f}" for c in cells) + " |")
    return lines


def cpu_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ratios with their intervals; one that was not taken says why."""
    lines = ["| what | ratio | 95 % interval | figure |", "| --- | ---: | ---: | --- |"]
    for name, meaning in CPU_ROWS.items():
        figure = figures[name]
        value, low, high = (figure[field] for field in ("value", "low", "high"))
        ratio = figure["why"] if value is None else f"{value:.2f}"
        lines.append(f"| {meaning} | {ratio} | {'' if low is None else f'{low:.2f} to {high:.2f}'} | `{name}` |")
    return lines


def tables() -> dict[str, list[str]]:
    """Lines of Markdown by the name of their mark."""
    return {"gpu": ["", *table(load(FIGURES)), ""], "cpu": ["", *cpu_table(load(CPU_FIGURES)), ""]}


def main(argv: Sequence[str] | None = None) -> int:
    return command(PROGRAM, __doc__, PAGE, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
