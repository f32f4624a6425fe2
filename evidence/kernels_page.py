"""The table of docs/kernels.md, written from evidence/gpu.json alone.

python -m evidence.kernels_page            write it between the page's marks
python -m evidence.kernels_page --check    fail if it is not that of the file
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence.figures import ROOT, load

PAGE = ROOT / "docs" / "kernels.md"
FIGURES = Path(__file__).with_name("gpu.json")
BEGIN, END = "<!-- gpu: written by python -m evidence.kernels_page -->", "<!-- gpu: end -->"
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
    device = figures["device.gigabytes_per_second"]["versions"]["device"]
    tokens = sorted({int(name.split(".")[0][1:]) for name in figures if name.endswith("n4.full")})
    lines = [
        f"Microseconds on one {device}:",
        "",
        "| tokens | " + " | ".join(COLUMNS.values()) + " |",
        "| ---: |" + " ---: |" * len(COLUMNS),
    ]
    for count in tokens:
        cells = [figures.get(f"t{count}.{column}") for column in COLUMNS]
        lines.append(f"| {count} | " + " | ".join("" if c is None else f"{c['value']:.0f}" for c in cells) + " |")
    return lines


def page(text: str) -> str:
    """The page with the table of the file between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *table(load(FIGURES)), "", END]) + after


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.kernels_page", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would change")
    arguments = parser.parse_args()
    was = PAGE.read_text()
    if arguments.check and page(was) != was:
        print(f"{PAGE.name} does not hold the figures of evidence/: run python -m evidence.kernels_page")
        return 1
    if not arguments.check:
        PAGE.write_text(page(was))
    return 0


if __name__ == "__main__":
    sys.exit(main())
