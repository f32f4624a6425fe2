"""Trace files to requests. Four formats, told apart by what they hold:

    t_s, input_tokens, output_tokens[, class]    one request a line; without lengths, the two columns may be missing
    t_s, total_rps, mean_..., rps_N, cv_N        one window a line (as ServeGen publishes): rates, drawn as requests
    {"status": ..., "data": {"result": ...}}     a Prometheus range query of a rate in requests a second, as JSON

A trace is thinned or multiplied, its arrivals never stretched: that would change how long a burst lasts beside the
time that a pod needs to start. A factor above 1 copies requests, each copy up to a second later, so that bursts keep
their shape.
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prism_operator.simulate.workload import SimRequest, exponential, gamma_renewal


class TraceError(ValueError):
    """A trace file cannot be used; the message names the file, the place, and what would work."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a trace is read.

    start_s, span_s   the part that is played; times then count from its start
    factor            requests per request of the trace: 0.5 keeps half of them, 3 triples them
    prompt, output    mean tokens where the trace has no lengths (drawn exponentially)
    longest           clip prompts and outputs to these, for a model with a short context
    """

    service_class: str
    seed: int = 0
    start_s: float = 0.0
    span_s: float = math.inf
    factor: float = 1.0
    prompt: float = 512
    output: float = 128
    longest_prompt: int = 10**9
    longest_output: int = 10**9


def read(path: Path, how: Reading) -> list[SimRequest]:
    """Requests of a trace in order of arrival. Raises TraceError for a file that is no trace, or empty in that part."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read as text: {error}") from error
    rng = random.Random(f"{how.seed}/trace")
    if text.lstrip().startswith("{"):
        found = list(_drawn(_prometheus(path, text, how), how, rng))
    else:
        rows = csv.DictReader(text.splitlines())
        columns = set(rows.fieldnames or ())
        if {"t_s", "total_rps"} <= columns:
            found = list(_rates(path, list(rows), how, rng))
        elif "t_s" in columns:
            found = list(_requests(path, rows, how, rng))
        else:
            raise TraceError(
                f"{path.name}: must be a Prometheus range result (JSON), or CSV with a column `t_s` (requests: "
                f"`input_tokens`, `output_tokens`, `class`) or `t_s` and `total_rps` (rates); found {sorted(columns)}"
            )
    if not found:
        raise TraceError(
            f"{path.name}: no request from {how.start_s:g} s for {how.span_s:g} s at factor {how.factor:g}"
        )
    return sorted(found, key=lambda request: request.arrived_s)


def _requests(path: Path, rows: Iterable[dict[str, str]], how: Reading, rng: random.Random) -> Iterator[SimRequest]:
    prompts, outputs = exponential(how.prompt), exponential(how.output)
    for number, row in enumerate(rows, start=2):
        try:
            at_s = float(row["t_s"]) - how.start_s
            if not 0 <= at_s < how.span_s:
                continue
            prompt = int(row["input_tokens"]) if row.get("input_tokens") else prompts(rng)
            output = int(row["output_tokens"]) if row.get("output_tokens") else outputs(rng)
        except ValueError as error:
            raise TraceError(f"{path.name}, line {number}: {error}; t_s must be a number, lengths whole") from error
        for copy in range(_copies(how.factor, rng)):
            later_s = rng.random() if copy else 0.0
            yield _request(how, at_s + later_s, prompt, output, row.get("class"))


def _copies(factor: float, rng: random.Random) -> int:
    whole = math.floor(factor)
    return whole + (rng.random() < factor - whole)


def _request(how: Reading, at_s: float, prompt: int, output: int, name: str | None = None) -> SimRequest:
    prompt, output = min(max(1, prompt), how.longest_prompt), min(max(1, output), how.longest_output)
    return SimRequest(at_s, name or how.service_class, prompt, output)


@dataclass(frozen=True, slots=True)
class Span:
    """A window of a rate trace; `clients` are (rate, coefficient of variation), the remainder is Poisson."""

    start_s: float
    end_s: float
    rate: float
    prompt: float
    output: float
    clients: Sequence[tuple[float, float]] = ()


def _rates(path: Path, rows: list[dict[str, str]], how: Reading, rng: random.Random) -> Iterator[SimRequest]:
    def number(row: dict[str, str], column: str, default: float = 0.0) -> float:
        return float(row[column]) if row.get(column) else default

    clients = [column.removeprefix("rps_") for column in (rows[0] if rows else ()) if column.startswith("rps_")]
    try:
        times = [float(row["t_s"]) for row in rows]
        width = min((later - earlier for earlier, later in pairwise(times)), default=600.0)
        spans = [
            Span(
                start_s=at_s,
                end_s=at_s + width,
                rate=number(row, "total_rps"),
                prompt=number(row, "mean_input_tokens") or how.prompt,
                output=number(row, "mean_output_tokens") or how.output,
                clients=[(number(row, f"rps_{one}"), number(row, f"cv_{one}", 1.0)) for one in clients],
            )
            for at_s, row in zip(times, rows, strict=True)
        ]
    except ValueError as error:
        raise TraceError(f"{path.name}: every cell must be a number; {error}") from error
    return _drawn(spans, how, rng)


def _drawn(spans: Sequence[Span], how: Reading, rng: random.Random) -> Iterator[SimRequest]:
    """Requests drawn from rates. A window of rate 0 is a gap in the source, and refused: it is not an idle service."""
    for span in spans:
        start_s, end_s = span.start_s - how.start_s, span.end_s - how.start_s
        if end_s <= 0 or start_s >= how.span_s:
            continue
        prompt, output = exponential(span.prompt), exponential(span.output)
        rest = max(0.0, span.rate - sum(rate for rate, _ in span.clients))
        for rate, variation in (*span.clients, (rest, 1.0)):
            # Thinning a renewal process by p brings its squared coefficient of variation to 1 + p * (cv^2 - 1).
            spread = math.sqrt(max(0.0, 1 + min(1.0, how.factor) * (variation * variation - 1)))
            for at_s in gamma_renewal(rng, max(0.0, start_s), min(end_s, how.span_s), rate * how.factor, spread):
                yield _request(how, at_s, prompt(rng), output(rng))


def _prometheus(path: Path, text: str, how: Reading) -> list[Span]:
    """Sum over the series of a range query; the step is the least distance of two samples."""
    try:
        series = json.loads(text)["data"]["result"]
        rates: dict[float, float] = {}
        for one in series:
            for at_s, value in one["values"]:
                if not math.isnan(float(value)):
                    rates[float(at_s)] = rates.get(float(at_s), 0.0) + float(value)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path.name}: must be the answer of /api/v1/query_range (data.result[].values); {error!r}. "
            "Export it with: curl -G PROMETHEUS/api/v1/query_range --data-urlencode 'query=sum(rate(...[1m]))' "
            "-d start=... -d end=... -d step=15"
        ) from error
    times = sorted(rates)
    if len(times) < 2:
        raise TraceError(f"{path.name}: holds {len(times)} samples; a range of at least two is needed")
    step_s = min(later - earlier for earlier, later in pairwise(times))
    return [Span(at_s - times[0], at_s - times[0] + step_s, rates[at_s], how.prompt, how.output) for at_s in times]
