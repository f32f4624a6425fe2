"""Results as a table for a terminal, and as JSON."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from prism_operator.simulate.score import Score
from prism_operator.simulate.study import Results, dominating, interval

Value = Callable[[Score], float | None]


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of the table: heading, how it is taken from a run, how its mean is printed."""

    title: str
    value: Value
    text: Callable[[float], str]


def _seconds(value: float) -> str:
    return f"{value:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.0f}"


COLUMNS = (
    Column("attainment %", lambda s: s.attainment, lambda v: f"{v * 100:.2f}"),
    Column("replicas", lambda s: s.mean_replicas, lambda v: f"{v:.2f}"),
    Column("replica-h", lambda s: s.replica_hours, lambda v: f"{v:.2f}"),
    Column("cost", lambda s: s.cost, lambda v: f"{v:.2f}"),
    Column("quality", lambda s: s.relative_quality, lambda v: f"{v:.4f}"),
    Column("eff. accuracy", lambda s: s.effective_accuracy, lambda v: f"{v:.4f}"),
    Column("goodput/s", lambda s: s.goodput_per_s, lambda v: f"{v:.2f}"),
    Column("TTFT p50 s", lambda s: s.ttft_s[0], _seconds),
    Column("p95", lambda s: s.ttft_s[1], _seconds),
    Column("p99", lambda s: s.ttft_s[2], _seconds),
    Column("TPOT p50 ms", lambda s: s.tpot_s[0], _milliseconds),
    Column("p95", lambda s: s.tpot_s[1], _milliseconds),
    Column("p99", lambda s: s.tpot_s[2], _milliseconds),
    Column("shed+lost", lambda s: s.shed + s.lost, lambda v: f"{v:.0f}"),
    Column("switches", lambda s: s.switches, lambda v: f"{v:.0f}"),
    Column("flaps", lambda s: s.point_flaps + s.replica_flaps, lambda v: f"{v:.0f}"),
    Column("scalings", lambda s: s.replica_changes, lambda v: f"{v:.0f}"),
)


def cells(runs: Sequence[Score]) -> list[str]:
    """The means of one policy's runs, in order of COLUMNS; '-' where a figure does not exist."""
    found = []
    for column in COLUMNS:
        values = [value for run in runs if (value := column.value(run)) is not None]
        found.append(column.text(statistics.fmean(values)) if values else "-")
    return found


def table(results: Results) -> str:
    """Means over seeds, one policy a line, best attainment first; a star marks what dominates prism."""
    better = dominating(results.scores)
    order = sorted(results.scores, key=lambda name: -statistics.fmean(s.attainment for s in results.scores[name]))
    return _lines("policy", [(f"{name}*" if name in better else name, results.scores[name]) for name in order])


def services_table(scores: Mapping[str, Sequence[Score]]) -> str:
    """Means over seeds, one service a line."""
    return _lines("service", list(scores.items()))


def _lines(heading: str, of: Sequence[tuple[str, Sequence[Score]]]) -> str:
    rows = [[heading, *(column.title for column in COLUMNS)], *([name, *cells(runs)] for name, runs in of)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_json(results: Results, what: Mapping[str, object]) -> str:
    """Everything that was measured; `what` says of what."""
    summary = {
        name: {
            "attainment": interval([run.attainment for run in runs]),
            "replica_hours": interval([run.replica_hours for run in runs]),
        }
        for name, runs in results.scores.items()
    }
    document = {
        "of": dict(what),
        "mean_low_high": summary,
        "dominating_prism": dominating(results.scores),
        "runs": [asdict(run) for runs in results.scores.values() for run in runs],
    }
    return json.dumps(document, indent=1)


def services_json(scores: Mapping[str, Sequence[Score]], what: Mapping[str, object]) -> str:
    """Every run of every service; `what` says of what."""
    runs = {name: [asdict(one) for one in taken] for name, taken in scores.items()}
    return json.dumps({"of": dict(what), "services": runs}, indent=1)
