"""The control API's messages: directive (operator to pod) and report (pod to operator). Version `control.v1`.

A directive is the full state, never a difference: a lost, repeated or reordered one can always be repaired by the
next. (epoch, sequence) fences it; the envelope's time to live bounds how long a pod obeys a silent operator.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from prism_api.base import Digest, Document, Name
from prism_api.profile import Profile

CONTROL_VERSION: Final = "control.v1"
OPERATOR_IDENTITY = "spiffe://moeprism.io/operator"
MAX_BODY_BYTES = 64 * 1024

HISTOGRAM_BOUNDS_MS: tuple[float, ...] = (*(1.3**i for i in range(47)), float("inf"))
"""Upper bounds of the latency histograms in milliseconds; fixed within a control version."""
INPUT_BOUNDS_TOKENS = (256, 1024, 4096)
OUTPUT_BOUNDS_TOKENS = (32, 128, 512)

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]
Histogram = Annotated[list[Count], Field(min_length=48, max_length=48)]
InOutCells = Annotated[list[Count], Field(min_length=16, max_length=16)]


def server_name(namespace: str, service: str) -> str:
    """TLS server name of a service's pods; the operator dials a pod's IP with this name."""
    return f"{service}.{namespace}.moeprism.internal"


class Fence(Document):
    """(epoch, sequence), compared lexicographically. Epochs are fleet-wide, sequences count per service."""

    epoch: Count
    sequence: Count

    def __lt__(self, other: "Fence") -> bool:
        return (self.epoch, self.sequence) < (other.epoch, other.sequence)


class ServiceReference(Document):
    namespace: Annotated[str, Field(min_length=1, max_length=63)]
    name: Annotated[str, Field(min_length=1, max_length=63)]
    uid: Annotated[str, Field(min_length=1, max_length=64)]


class Admission(StrEnum):
    ACCEPT = "Accept"
    SHED = "Shed"


class ClassDirective(Document):
    """One service class: objectives, the point to run at, and the range in which the governor may move."""

    name: Name
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    point: Name
    floor: Name
    ceiling: Name
    admission: Admission = Admission.ACCEPT


class Envelope(Document):
    ttl_ms: Milliseconds
    safe_point: Name


class GovernorSettings(Document):
    """Saturation thresholds in per-mille of the objective, and dwell times of the pod's own moves."""

    high: Annotated[int, Field(ge=1, le=2000)] = 600
    low: Annotated[int, Field(ge=1, le=2000)] = 400
    dwell_down_ms: Annotated[int, Field(ge=0, le=60_000)] = 200
    dwell_up_ms: Annotated[int, Field(ge=0, le=600_000)] = 10_000

    @model_validator(mode="after")
    def _ordered(self) -> "GovernorSettings":
        if self.low >= self.high:
            raise ValueError(f"governor.low must be less than governor.high; found {self.low} and {self.high}")
        return self


class Directive(Document):
    """PUT /v1/directive. Pods refuse a lower fence (409), an unknown point (422), a wrong service (403)."""

    version: Literal["control.v1"] = CONTROL_VERSION
    service: ServiceReference
    model_digest: Digest | None = None
    holder: Annotated[str, Field(min_length=1, max_length=128)]
    epoch: Count
    sequence: Count
    default_class: Name
    classes: list[ClassDirective] = Field(min_length=1, max_length=8)
    envelope: Envelope
    governor: GovernorSettings = Field(default_factory=GovernorSettings)
    reason: Annotated[str, Field(min_length=1, max_length=64)]

    @property
    def fence(self) -> Fence:
        return Fence(epoch=self.epoch, sequence=self.sequence)

    @model_validator(mode="after")
    def _classes_consistent(self) -> "Directive":
        names = [c.name for c in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"classes must have distinct names; found {names}")
        if self.default_class not in names:
            raise ValueError(f"defaultClass must be one of classes {names}; found '{self.default_class}'")
        return self


class EnvelopeState(StrEnum):
    UNMANAGED = "Unmanaged"
    MANAGED = "Managed"
    EXPIRED = "Expired"


class Held(Document):
    """The fence a pod holds; epoch and sequence are 0 while it is Unmanaged."""

    epoch: Count = 0
    sequence: Count = 0
    age_ms: Count = 0
    ttl_left_ms: Count = 0
    state: EnvelopeState = EnvelopeState.UNMANAGED

    @property
    def fence(self) -> Fence:
        return Fence(epoch=self.epoch, sequence=self.sequence)


class EffectivePoint(Document):
    """What a class runs at now: requested is not effective until this says so."""

    class_name: Name = Field(alias="class")
    point: Name
    plan_version: Count


class Load(Document):
    running: Count
    waiting: Count
    kv_blocks: Count
    kv_blocks_used: Count
    preemptions: Count


class ClassCounters(Document):
    """Cumulative since `startId`; the reader takes differences, so a lost poll loses nothing."""

    name: Name
    arrived: Count = 0
    finished: Count = 0
    met: Count = 0
    missed: Count = 0
    shed: Count = 0
    cancelled: Count = 0
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    ttft: Histogram = Field(default_factory=lambda: [0] * 48)
    tpot: Histogram = Field(default_factory=lambda: [0] * 48)
    in_out: InOutCells = Field(default_factory=lambda: [0] * 16)
    tokens_by_point: dict[str, Count] = Field(default_factory=dict)


class PodReference(Document):
    name: str
    uid: str


class RuntimeReference(Document):
    image_digest: str
    accelerator: Name


class ModelReference(Document):
    digest: Digest


class Steps(Document):
    count: Count
    busy_ms: Count


class TlsState(Document):
    trust_hash: str
    leaf_serial: str


class Report(Document):
    """GET /v1/report, and the body of every answer to a PUT."""

    version: Literal["control.v1"] = CONTROL_VERSION
    pod: PodReference
    start_id: Annotated[str, Field(min_length=1, max_length=64)]
    runtime: RuntimeReference
    model: ModelReference
    held: Held
    effective: list[EffectivePoint]
    load: Load
    classes: list[ClassCounters]
    steps: Steps
    ready: bool
    draining: bool
    tls: TlsState | None = None
    profile: Profile | None = None
    ignored: list[str] = Field(default_factory=list, description="Directive fields this pod does not know.")


class Refusal(Document):
    """Body of a refused PUT (403, 409, 412, 413, 422): why, and what the pod holds."""

    error: str
    held: Held
    known_points: list[str] = Field(default_factory=list)


def histogram_quantile(counts: list[int], quantile: float) -> float | None:
    """Upper estimate of a latency quantile in milliseconds by linear interpolation; None without samples."""
    total = sum(counts)
    if total == 0:
        return None
    rank, seen = quantile * total, 0
    bounds = (0.0, *HISTOGRAM_BOUNDS_MS)
    for count, (low, high) in zip(counts, pairwise(bounds), strict=True):
        if count and seen + count >= rank:
            return low if high == float("inf") else low + (high - low) * max(0.0, rank - seen) / count
        seen += count
    return bounds[-2]


def histogram_bucket(milliseconds: float) -> int:
    """Index of the bucket that counts a latency."""
    return next(i for i, bound in enumerate(HISTOGRAM_BOUNDS_MS) if milliseconds <= bound)


def in_out_cell(prompt_tokens: int, output_tokens: int) -> int:
    """Index of the prompt x output length cell, row-major."""
    row = sum(prompt_tokens > bound for bound in INPUT_BOUNDS_TOKENS)
    column = sum(output_tokens > bound for bound in OUTPUT_BOUNDS_TOKENS)
    return row * 4 + column
