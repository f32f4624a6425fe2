"""What a replay leaves behind: one line per answer and per sample, as JSON, on one clock.

All times are seconds since the replay began. The replay tells when that was on CLOCK_MONOTONIC, which all processes of
a machine share, so that samples of another process can be moved to its clock.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Answer:
    """The fate of one request, as its client saw it.

    at_s        when the trace sends it; latencies count from here, so that a late client cannot flatter the server
    sent_s      when it was really sent
    outcome     finished, shed (429) or failed
    status      HTTP status, 0 if none came
    end_s       last byte, or when the request was given up
    tpot_s      None for answers of one token
    point       operating point that made the first token (header x-prism-operating-point)
    retries     connections refused or reset before any byte; such a request is sent again
    error       None for a finished answer
    """

    index: int
    at_s: float
    sent_s: float
    outcome: Literal["finished", "shed", "failed"]
    status: int
    end_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    point: str | None = None
    retries: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PodSample:
    """One pod's /metrics: the live point by class, load, and since the pod began tokens by point and busy seconds.

    `lag_s` is the part of `busy_s` by which steps were slower than their pace; 0 for pods without one.
    """

    points: Mapping[str, str]
    waiting: int
    running: int
    tokens_by_point: Mapping[str, int]
    busy_s: float = 0.0
    lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment. `existing` counts every pod that holds its accelerator, also starting and ending."""

    at_s: float
    desired: int
    ready: int
    existing: int
    pods: Mapping[str, PodSample] = field(default_factory=dict)


def as_line(record: Answer | Sample) -> str:
    return json.dumps(asdict(record), separators=(",", ":")) + "\n"


def read_answers(path: Path) -> list[Answer]:
    """The answers so far, in the order of their ends. A half-written last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Answer(**json.loads(line)) for line in lines if line.endswith("\n")]


def sample_from(document: dict[str, Any]) -> Sample:
    pods = {name: PodSample(**pod) for name, pod in document["pods"].items()}
    return Sample(**(document | {"pods": pods}))


def read_samples(path: Path) -> list[Sample]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [sample_from(json.loads(line)) for line in lines]


def on_clock_of(samples: Iterable[Sample], began_s: float) -> list[Sample]:
    """Samples whose `at_s` is CLOCK_MONOTONIC, moved to the clock of a replay that began then."""
    return [replace(sample, at_s=round(sample.at_s - began_s, 3)) for sample in samples]
