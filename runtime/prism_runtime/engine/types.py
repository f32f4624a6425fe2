"""What crosses the engine's border: requests in, events out, the plan, and the load it reports.

Token ids only: text, stop strings and HTTP belong to `server/`. Every submitted request gets exactly one `Finished`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Sampling:
    """Per-request sampling. temperature 0 is greedy. A seed makes draws independent of batch mates.

    top_k               only the most likely tokens, ties with the last one included; 0 for all
    min_p               only tokens at least this share as likely as the most likely one
    presence_penalty    taken from the logit of every token that the answer holds already
    frequency_penalty   the same, once for each time
    repetition_penalty  divides positive logits and multiplies negative ones of tokens of prompt and answer (CTRL,
                        arXiv 1909.05858); 1 for none
    logit_bias          (token id, what to add to its logit)
    top_logprobs        how many of the most likely tokens to report with each token; 0 for the token itself alone, None
                        for nothing
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    @property
    def reshapes(self) -> bool:
        """Whether logits change before temperature: what even a greedy choice must see."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.logit_bias)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request's class was promised, and the lowest operating point (ladder index) that it may be run at to keep
    promises. None: no objective; no other point than its class's."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    floor: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request after admission at the door; `prompt` holds token ids, `service_class` indexes the plan's classes."""

    request_id: str
    prompt: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    service_class: int = 0
    priority: int = 0
    promise: Promise = Promise()


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Of one token and of the most likely ones in its place, most likely first: the model's own at the operating point,
    before bias, penalties and temperature."""

    token: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, with the plan version and the operating point (ladder index) of the step that made it."""

    request_id: str
    token_id: int
    plan_version: int
    point: int
    log_probabilities: LogProbabilities | None = None


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
    """What one step did; its shape is what a profile prices. `decode_at` and `prefill_at` are sequences and prompt
    tokens by the operating point (ladder index) that they ran at."""

    events: tuple[Event, ...]
    plan: Plan
    decode_at: Mapping[int, int]
    context_tokens: int
    prefill_at: Mapping[int, int]

    @property
    def decode_sequences(self) -> int:
        return sum(self.decode_at.values())

    @property
    def prefill_tokens(self) -> int:
        return sum(self.prefill_at.values())

    @property
    def idle(self) -> bool:
        return self.decode_sequences == 0 and self.prefill_tokens == 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Blocks are used by sequences, or kept unused for prompts that begin with what they hold. Counts are since the
    start; of `prompt_tokens`, as many as `prompt_tokens_known` were found in kept blocks and not computed."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    preemptions: int
    kv_blocks_kept: int = 0
    prompt_tokens: int = 0
    prompt_tokens_known: int = 0


class Rejected(ValueError):
    """A request refused before it could reach a step; `parameter` names the field to change."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Overloaded(Exception):
    """A request refused because its first token would come far too late, whatever budgets sink to."""

    def __init__(self, wait_s: float, ttft_s: float) -> None:
        super().__init__(f"the first token would come in {wait_s:.1f} s, {ttft_s:g} s are promised")
        self.retry_after_s = wait_s - ttft_s
