"""Request traces: when requests arrive and how long they are.

    python -m examples.demo.trace cut SOURCE.csv --start S --span S --keep SHARE --seed N --out FILE.csv
    python -m examples.demo.trace choose SOURCE.csv     windows whose burst a knob can absorb, best first
    python -m examples.demo.trace describe FILE.csv     what the demo is expected to show on it

A cut is thinned, never stretched: stretching would change how long a burst lasts beside the time a pod needs to start.
Lengths are clipped to the window of the embedded model. CSV columns: t_s, input_tokens, output_tokens.
"""

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "traces" / "azure2023_code_burst.csv"
SHIPPED_FAST = Path(__file__).parents[1] / "traces" / "azure2023_code_burst_fast.csv"

MAX_PROMPT_TOKENS = 320
MAX_OUTPUT_TOKENS = 64
"""Together well inside the embedded model's 512-token window."""

COLUMNS = ["t_s", "input_tokens", "output_tokens"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; `at_s` counts from the start of the replay."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a slice is taken from a longer trace: seconds [start, start + span), each request kept by chance `keep`."""

    start_s: float
    span_s: float
    keep: float
    seed: int


class TraceError(ValueError):
    """A trace file cannot be used; the message names the file, the line and what would work."""


def load(path: Path) -> list[Arrival]:
    """Arrivals of a CSV in order of time. Raises TraceError for a file that is no trace."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or not set(COLUMNS) <= set(rows.fieldnames):
            raise TraceError(f"{path.name}: columns must be {', '.join(COLUMNS)}; found {rows.fieldnames}")
        arrivals = [_arrival(row, f"{path.name}, line {number}") for number, row in enumerate(rows, start=2)]
    if not arrivals:
        raise TraceError(f"{path.name} holds no request; it must hold at least one line below the header")
    if any(later.at_s < earlier.at_s for earlier, later in pairwise(arrivals)):
        raise TraceError(f"{path.name}: t_s must not fall from line to line; sort the file by t_s")
    return arrivals


def _arrival(row: dict[str, str], where: str) -> Arrival:
    try:
        arrival = Arrival(float(row["t_s"]), int(row["input_tokens"]), int(row["output_tokens"]))
    except (TypeError, ValueError) as error:
        raise TraceError(f"{where}: t_s must be a number, the token counts whole numbers; {error}") from error
    if arrival.at_s < 0 or arrival.prompt_tokens < 1 or arrival.output_tokens < 1:
        raise TraceError(f"{where}: t_s must be at least 0 and both token counts at least 1; found {arrival}")
    return arrival


def save(arrivals: Iterable[Arrival], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows([f"{a.at_s:.3f}", a.prompt_tokens, a.output_tokens] for a in arrivals)


def cut(arrivals: Sequence[Arrival], how: Cut) -> list[Arrival]:
    """Slice, thin and clip. The same cut of the same trace is the same list, byte for byte."""
    rng = random.Random(how.seed)
    return [
        Arrival(
            round(a.at_s - how.start_s, 3),
            min(a.prompt_tokens, MAX_PROMPT_TOKENS),
            min(a.output_tokens, MAX_OUTPUT_TOKENS),
        )
        for a in arrivals
        if how.start_s <= a.at_s < how.start_s + how.span_s and rng.random() < how.keep
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.trace", description="Cut and describe traces.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cutter = commands.add_parser("cut", help="take a slice of a longer trace")
    cutter.add_argument("source", type=Path)
    cutter.add_argument("--start", type=float, required=True, help="first second of the slice")
    cutter.add_argument("--span", type=float, required=True, help="length of the slice in seconds")
    cutter.add_argument("--keep", type=float, required=True, help="share of requests kept, 0 to 1")
    cutter.add_argument("--seed", type=int, required=True, help="seed of the choice which requests are kept")
    cutter.add_argument("--out", type=Path, required=True)
    chooser = commands.add_parser("choose", help="search a longer trace for slices whose burst a knob can absorb")
    chooser.add_argument("source", type=Path)
    chooser.add_argument("--span", type=float, default=75, help="length of the slice in seconds (default 75)")
    chooser.add_argument("--calm", type=float, default=15, help="calm seconds before the burst (default 15)")
    describer = commands.add_parser("describe", help="predict what a replay shows, by simulation of the paced engine")
    describer.add_argument("trace", type=Path)
    for command in (chooser, describer):
        command.add_argument("--pace", default="demo", help="shipped pace profile, or a JSON file (default demo)")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        if arguments.command == "cut":
            how = Cut(arguments.start, arguments.span, arguments.keep, arguments.seed)
            kept = cut(load(arguments.source), how)
            save(kept, arguments.out)
            print(f"{len(kept)} requests in {how.span_s:g} s written to {arguments.out}")
            return 0
        from examples.demo import foresight  # it imports this module

        profile = foresight.read_profile(arguments.pace)
        if arguments.command == "choose":
            source, span_s, calm_s = load(arguments.source), arguments.span, arguments.calm
            foresight.print_choices(source, profile, span_s=span_s, calm_s=calm_s)
        else:
            foresight.print_description(load(arguments.trace), profile)
    except (TraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
