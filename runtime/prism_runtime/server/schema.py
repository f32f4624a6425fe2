"""Request bodies of the OpenAI-compatible API. Every parameter works, is neutral, or is refused by name.

A parameter that is silently ignored makes a client believe in an answer it did not get; so unknown ones are refused,
and those of OpenAI's API that this runtime does not implement are accepted only at the value that changes nothing.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from prism_runtime.engine.types import Sampling
from prism_runtime.server.errors import ApiError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
}
"""OpenAI parameters without an implementation, and the values at which they ask for nothing. null is always neutral."""

TOP_NEEDS_LOGPROBS = "`top_logprobs` is only allowed when `logprobs` is true"
STREAM_OPTIONS_NEED_STREAM = "`stream_options` is only allowed when `stream` is true"


def _encodable(text: str) -> str:
    """JSON may escape half of a character pair, which is no text and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode text; it contains a lone surrogate") from None
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]


MOST_BIASED = 300
MOST_CHOICES = 16
Penalty = Annotated[float, Field(ge=-2, le=2, strict=True)]
Bias = Annotated[float, Field(ge=-100, le=100, strict=True)]
TokenKey = Annotated[StrictStr, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class _Sampled(BaseModel):
    """What both endpoints share.

    `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are extensions, with the names and values of vLLM.
    """

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    top_k: Annotated[StrictInt, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2, strict=True)] = 1.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASED)] = {}

    @property
    @abstractmethod
    def reported_logprobs(self) -> int | None:
        """How many alternatives to report with each token; None reports no probabilities."""

    def samplings(self, max_tokens: int, eos_token_ids: frozenset[int]) -> list[Sampling]:
        """What the engine is asked for, one for each choice: with a seed the next one draws from the next seed."""
        first = self._sampling(max_tokens, eos_token_ids)
        return [first if self.seed is None else replace(first, seed=self.seed + index) for index in range(self.n)]

    def _sampling(self, max_tokens: int, eos_token_ids: frozenset[int]) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop_token_ids=frozenset() if self.ignore_eos else eos_token_ids,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            top_logprobs=self.reported_logprobs,
        )

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Sampled):
    """POST /v1/completions. One prompt a request: text, or token ids."""

    prompt: Text | list[StrictInt]
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None

    @property
    def reported_logprobs(self) -> int | None:
        return self.logprobs


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def reported_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


Body = TypeVar("Body", CompletionRequest, ChatRequest)


def parse(model: type[Body], raw: bytes) -> Body:
    """The validated body. Raises ApiError 400 that names the parameter, without repeating the client's text."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body must be JSON", code="invalid_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    document = _without_neutral(document, model)
    try:
        body = model.model_validate(document)
    except ValidationError as error:
        raise _explain(error, model) from error
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, STREAM_OPTIONS_NEED_STREAM, param="stream_options", code="invalid_value")
    if isinstance(body, ChatRequest) and body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, TOP_NEEDS_LOGPROBS, param="top_logprobs", code="invalid_value")
    return body


def _without_neutral(document: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    kept = {name: value for name, value in document.items() if value is not None}
    for name in NEUTRAL.keys() & kept.keys() - model.model_fields.keys():
        value = kept.pop(name)
        # `False == 0` in Python, and `"logprobs": 0` asks for something: types are compared too.
        if not any(value == neutral and _kind(value) is _kind(neutral) for neutral in NEUTRAL[name]):
            raise ApiError(
                400,
                f"`{name}` is not implemented by this server; leave it out or set it to "
                f"{' or '.join(json.dumps(neutral) for neutral in NEUTRAL[name])}",
                param=name,
                code="unsupported_parameter",
            )
    return kept


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _explain(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first error as one sentence. pydantic's own text would quote the input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _names(model))
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:64]
        known = ", ".join(model.model_fields)
        return ApiError(400, f"unknown parameter `{name}`; known: {known}", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"`{path}` is required", param=path, code="missing_required_parameter")
    choices = {f["msg"] for f in error.errors(include_input=False) if f["loc"][:1] == first["loc"][:1]}
    reason = "; or ".join(sorted(message[:1].lower() + message[1:] for message in choices))
    return ApiError(400, f"`{path}` is invalid: {reason}", param=path, code="invalid_type")


def _names(model: type[BaseModel]) -> set[str]:
    """Names of parameters: pydantic's paths also hold the branches of unions, which mean nothing to a client."""
    return {*model.model_fields, *Message.model_fields, *StreamOptions.model_fields}
