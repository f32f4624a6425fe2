"""What crosses the engine's border: requests in, events out, the plan, and the load it reports.

Token ids only: text, stop strings and HTTP belong to `server/`. Every submitted request gets exactly one `Finished`.
"""

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Sampling:
    """Per-request sampling. temperature 0 is greedy. A seed makes draws independent of batch mates."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Request:
    """A request after admission at the door; `prompt` holds token ids, `service_class` indexes the plan's classes."""

    request_id: str
    prompt: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    service_class: int = 0
    priority: int = 0


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, with the plan version and the operating point (ladder index) of the step that made it."""

    request_id: str
    token_id: int
    plan_version: int
    point: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of a request. `error` says what failed, without user text."""

    request_id: str
    reason: FinishReason
    error: str | None = None


Event = Token | Finished


@dataclass(frozen=True, slots=True)
class Plan:
    """One operating point (ladder index) per service class. The version rises on every swap."""

    version: int
    class_point: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did; its shape is what a profile prices."""

    events: tuple[Event, ...]
    plan: Plan
    decode_sequences: int
    context_tokens: int
    prefill_tokens: int

    @property
    def idle(self) -> bool:
        return self.decode_sequences == 0 and self.prefill_tokens == 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    preemptions: int


class Rejected(ValueError):
    """A request refused before it could reach a step; `parameter` names the field to change."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter
