"""The table of docs/kernels.md, written from evidence/gpu.json alone.

python -m evidence.kernels_page            write it between the page's marks
python -m evidence.kernels_page --check    fail if it is not that of the file
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.figures import ROOT, load
from evidence.pages import command

PAGE = ROOT / "docs" / "kernels.md"
FIGURES = Path(__file__).with_name("gpu.json")
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


def tables() -> dict[str, list[str]]:
    """Lines of Markdown by the name of their mark."""
    return {"gpu": ["", *table(load(FIGURES)), ""]}


def main(argv: Sequence[str] | None = None) -> int:
    return command(PROGRAM, __doc__, PAGE, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
