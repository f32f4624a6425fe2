"""The live view of a replay: a table on a terminal, one line each few seconds without one."""

from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples.demo.results import Moment

PLAIN_EVERY_S = 5.0
REFRESH_PER_S = 4


class View:
    """Shows moments of one replay; a context manager, because a live table must be closed."""

    def __init__(self, console: Console, title: str, span_s: float) -> None:
        self._console, self._title, self._span_s = console, title, span_s
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_S) if console.is_terminal else None
        self._told_s = -PLAIN_EVERY_S

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, moment: Moment) -> None:
        if self._live is not None:
            self._live.update(as_table(moment, self._title, self._span_s))
        elif moment.at_s - self._told_s >= PLAIN_EVERY_S:
            self._told_s = moment.at_s
            self._console.print(as_line(moment), highlight=False, soft_wrap=True)


def as_table(moment: Moment, title: str, span_s: float) -> Table:
    """One row a quantity, with its unit."""
    table = Table(title=f"{title}: {moment.at_s:.0f} of {span_s:.0f} s", min_width=64, title_justify="left")
    table.add_column("quantity")
    table.add_column("now", justify="right", min_width=34)
    for name, value in rows(moment):
        table.add_row(name, value)
    return table


def rows(moment: Moment) -> list[tuple[str, str]]:
    points = " ".join(moment.points.values()) or "-"
    return [
        ("arrivals, requests/s (5 s)", f"{moment.arrivals_per_s:.1f}"),
        ("waiting / decoding requests", f"{moment.waiting} / {moment.running}"),
        ("p95 time to first token (5 s)", _seconds(moment.ttft_p95_s)),
        ("p95 time per output token (5 s)", _seconds(moment.tpot_p95_s, digits=3)),
        ("operating point of each pod", points),
        ("replicas ready / desired", f"{moment.ready} / {moment.desired}"),
        ("attainment since the start", _share(moment.attainment)),
        ("mean relative quality", "-" if moment.relative_quality is None else f"{moment.relative_quality:.4f}"),
        ("cost, $/h", "-" if moment.per_hour is None else f"{moment.per_hour:.2f}"),
    ]


def as_line(moment: Moment) -> str:
    points = ",".join(moment.points.values()) or "-"
    return (
        f"{moment.at_s:4.0f} s  {moment.arrivals_per_s:4.1f} req/s  waiting {moment.waiting:3}  "
        f"p95 TTFT {_seconds(moment.ttft_p95_s):>7}  p95 TPOT {_seconds(moment.tpot_p95_s, digits=3):>7}  "
        f"points {points}  replicas {moment.ready}/{moment.desired}  attainment {_share(moment.attainment)}"
    )


def _seconds(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
