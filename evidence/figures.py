"""Published figures: what one is, and the file that holds them."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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


SIGNED = ("points",)
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

    argv = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    libraries = {name: version(name) for name in PACKAGES}
    return {"commit": commit or "unknown", "python": sys.version.split()[0], "kubernetes": KUBERNETES} | libraries


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Figures of a file by id; none if there is no file yet."""
    return {figure["id"]: figure for figure in json.loads(path.read_text())} if path.exists() else {}


def merge(path: Path, taken: Figure, order: Sequence[str]) -> None:
    """Write one figure into the file and keep the others, in the order of `order`; other ids are dropped."""
    written = {key: value for key, value in asdict(taken).items() if key != "why" or value is not None}
    figures = load(path) | {taken.id: written}
    path.write_text(json.dumps([figures[name] for name in order if name in figures], indent=1) + "\n")
