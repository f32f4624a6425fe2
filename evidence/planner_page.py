"""The tables of docs/simulator.md, written from evidence/planner_pareto.json and planner_ablation.json alone.

python -m evidence.planner_page            write them between the page's marks
python -m evidence.planner_page --check    fail if they are not those of the files
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from evidence.figures import ROOT
from evidence.pages import command

PAGE = ROOT / "docs" / "simulator.md"
CELLS = Path(__file__).with_name("planner_pareto.json")
ABLATION = Path(__file__).with_name("planner_ablation.json")
PROGRAM = "evidence.planner_page"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every policy on every trace, Prism first and then by attainment; what dominates Prism is bold."""
    lines = [
        "| trace | policy | attainment | 95 % interval | replica-hours | mean quality |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for trace, cells in groupby(rows, key=lambda row: row["trace"]):
        for row in sorted(cells, key=lambda row: (row["policy"] != "prism", -row["attainment"][0])):
            mean, low, high = (f"{100 * value:.2f}" for value in row["attainment"])
            name = f"**{row['policy']}**" if row["dominates_prism"] else row["policy"]
            hours, quality = f"{row['replica_hours'][0]:.2f}", f"{row['relative_quality']:.4f}"
            lines.append(f"| `{trace}` | {name} | {mean} | {low} to {high} | {hours} | {quality} |")
    return lines


def ablation(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every variant on every load, in the order of the file."""
    lines = [
        "| load | Prism with | attainment | 95 % interval | replica-hours | mean quality | switches |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mean, low, high = (f"{100 * value:.2f}" for value in row["attainment"])
        spent = f"{row['replica_hours'][0]:.2f} | {row['relative_quality']:.4f} | {row['switches']:.0f}"
        lines.append(f"| `{row['load']}` | {row['variant']} | {mean} | {low} to {high} | {spent} |")
    return lines


def tables() -> dict[str, list[str]]:
    """Lines of Markdown by the name of their mark."""
    return {
        "pareto": table(json.loads(CELLS.read_text())),
        "ablation": ablation(json.loads(ABLATION.read_text())["rows"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return command(PROGRAM, __doc__, PAGE, tables, argv)


if __name__ == "__main__":
    sys.exit(main())
