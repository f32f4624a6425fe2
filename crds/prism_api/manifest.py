"""Manifest of an elastic artifact (`prism_manifest.json`): what was partitioned, how, and what each point measured.

An artifact is a plain Hugging Face checkpoint whose neurons are permuted inside each expert, plus a sidecar tensor file
and this manifest, which is written last and atomically: its presence means "complete".
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from prism_api.base import Digest, Document
from prism_api.points import Ladder, OperatingPoint

MANIFEST_NAME = "prism_manifest.json"
SIDECAR_NAME = "prism_sidecar.safetensors"
SCHEMA_VERSION = 1

Positive = Annotated[int, Field(ge=1)]


class SourceModel(Document):
    name: str
    architecture: str
    licence: str
    revision: str | None = None
    digest: Digest


class Shape(Document):
    moe_layers: list[int] = Field(min_length=1)
    experts: Positive
    top_k: Positive
    neurons: Positive
    hidden: Positive
    sub_experts: Positive
    neurons_per_sub_expert: Positive
    norm_topk_prob: bool


class FileEntry(Document):
    path: str
    bytes: Annotated[int, Field(ge=0)]
    digest: Digest


class CalibrationText(Document):
    name: str
    digest: Digest
    licence: str
    tokens: Annotated[int, Field(ge=0)]


class Calibration(Document):
    texts: list[CalibrationText]
    sequence_length: Positive
    seeds: list[int]


class Divergence(Document):
    """KL to the full model in nats per token, on text disjoint from the calibration text."""

    mean: float
    standard_error: float
    p99: float
    tokens: Positive
    median: float | None = None
    max: float | None = None


class MeasuredPoint(OperatingPoint):
    """An operating point with the evidence behind its quality; the extra fields stay in the artifact.

    realised_permille          mean realised budget on the evaluation text, every cost counted
    realised_permille_by_text  the same for each text, by its name
    ce_delta                   rise of the cross entropy over the full model's, in nats a token
    touched_bytes_share        share of the routed experts' weight bytes that one step reads, by its number of tokens
    distinct                   KL differs from the next point's beyond the bootstrap interval, and cost by 1 % or more
    stable                     its place on the ladder is kept over calibration seeds and texts
    None where it was not measured.
    """

    kl: Divergence | None = None
    same_top1: float | None = None
    realised_permille: Annotated[int, Field(ge=1, le=1000)] | None = None
    realised_permille_by_text: dict[str, Annotated[int, Field(ge=1, le=1000)]] | None = None
    ce_delta: float | None = None
    touched_bytes_share: dict[str, float] | None = None
    distinct: bool | None = None
    stable: bool | None = None


class Manifest(Document):
    schema_version: Literal[1] = 1
    kind: Literal["prism.artifact"] = "prism.artifact"
    tools: dict[str, str]
    source: SourceModel
    shape: Shape
    files: list[FileEntry]
    calibration: Calibration
    partition: dict[str, Any]
    gate: dict[str, Any]
    operating_points: list[MeasuredPoint] = Field(min_length=1, max_length=32)

    @property
    def ladder(self) -> Ladder:
        return Ladder(self.operating_points)
