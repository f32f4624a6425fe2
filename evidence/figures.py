"""Published figures: what one is, and the file that holds them."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

ROOT = Path(__file__).parents[1]
WRITTEN = ("evidence/*.json", "docs/evaluation.md", "docs/kernels.md", "docs/simulator.md")
"""What the evidence programs write: a figure does not depend on the one that was taken before it."""
PACKAGES = ("torch", "transformers", "kopf", "kubernetes", "aiohttp")


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number.

    value     None if it could not be taken; then `why` says why
    low, high 95 % interval of the mean over repeated runs, within what the unit can be; None for a single run
    how       the command that took it
    seeds     of whatever was random and could be seeded
    """

    id: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    how: str
    seeds: Sequence[int] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    why: str | None = None


class NotTaken(RuntimeError):
    """A figure could not be taken; the message becomes its `why`."""


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t by number of runs; more than ten runs take the value of ten."""


SIGNED = ("points", "hours")
"""Units whose values can be negative, such as differences."""


def measured(name: str, values: Sequence[float | None], unit: str, how: str, seeds: Sequence[int] = ()) -> Figure:
    """Mean of repeated runs with its 95 % interval (Student's t), or one run's value without an interval.

    A run that gave nothing makes the figure say so.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return absent(name, unit, how, f"{len(values) - len(known)} of {len(values)} runs did not show it")
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Figure(name, _rounded(mean), None, None, unit, how, seeds, versions())
    half = T_95[min(len(known), max(T_95))] * statistics.stdev(known) / math.sqrt(len(known))
    least, most = -math.inf if unit in SIGNED else 0.0, 1.0 if unit == "share" else math.inf
    low, high = max(least, mean - half), min(most, mean + half)
    return Figure(name, _rounded(mean), _rounded(low), _rounded(high), unit, how, seeds, versions())


def _rounded(value: float) -> float:
    """To four decimals, or to four significant digits where that is finer: a KL of 0.0047 has more to say."""
    return round(value, 4 if not value else max(4, 3 - math.floor(math.log10(abs(value)))))


def absent(name: str, unit: str, how: str, why: str) -> Figure:
    return Figure(name, None, None, None, unit, how, versions=versions(), why=why)


def versions() -> dict[str, str]:
    """Of this checkout, Python, Kubernetes and the libraries that figures depend on."""
    from tests.localcluster.binaries import KUBERNETES

    libraries = {name: version(name) for name in PACKAGES}
    return {"commit": _commit(), "python": sys.version.split()[0], "kubernetes": KUBERNETES} | libraries


def _commit() -> str:
    """Of what figures are taken with: "-dirty" if anything differs from it but what taking figures writes."""

    def git(*argv: str) -> str:
        return subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    return (commit or "unknown") + ("-dirty" if changed else "")


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Figures of a file by id; none if there is no file yet."""
    return {figure["id"]: figure for figure in json.loads(path.read_text())} if path.exists() else {}


def merge(path: Path, taken: Figure, order: Sequence[str]) -> None:
    """Write one figure into the file and keep the others, in the order of `order`; other ids are dropped."""
    written = {key: value for key, value in asdict(taken).items() if key != "why" or value is not None}
    written["seeds"] = list(taken.seeds)  # JSON knows no ranges
    figures = load(path) | {taken.id: written}
    path.write_text(json.dumps([figures[name] for name in order if name in figures], indent=1) + "\n")


Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Collector(Generic[Subject]):
    """How a figure is taken of a subject: `take` gives one value a run, or raises NotTaken."""

    unit: str
    how: str
    take: Callable[[Subject], Sequence[float | None]]
    seeds: Sequence[int] = ()


def collect(collectors: Mapping[str, Collector[Subject]], name: str, subject: Subject) -> Figure:
    """One figure; what could not be taken says why."""
    collector = collectors[name]
    try:
        return measured(name, collector.take(subject), collector.unit, collector.how, collector.seeds)
    except NotTaken as error:
        return absent(name, collector.unit, collector.how, str(error))


def take_into(
    path: Path,
    collectors: Mapping[str, Collector[Subject]],
    names: Iterable[str],
    subject: Subject,
    say: Callable[[str], object],
    keep_known: Callable[[str], bool] = lambda name: False,
) -> None:
    """Take the named figures and write each into the file at once, so that an interruption loses nothing.

    `keep_known` names those whose figure in the file is better than a new one that could not be taken.
    """
    known = load(path)
    for name in names:
        figure = collect(collectors, name, subject)
        if figure.why is not None and name in known and keep_known(name):
            continue
        merge(path, figure, tuple(collectors))
        say(f"{name}: {figure.value if figure.why is None else f'not taken: {figure.why}'}")


def fill_in(path: Path, collectors: Mapping[str, Collector[Any]], why: str) -> None:
    """An absent figure for every id that the file does not hold."""
    for name in collectors.keys() - load(path).keys():
        merge(path, absent(name, collectors[name].unit, collectors[name].how, why), tuple(collectors))
