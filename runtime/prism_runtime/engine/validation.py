"""What a request must be before it may reach a step, where it could harm others."""

import math

from prism_runtime.engine.types import Rejected, Request, Sampling


def context_tokens(request: Request) -> int:
    """The longest context a request can reach. Its last token is never run, but counting it keeps the rule simple."""
    return len(request.prompt) + request.sampling.max_tokens


def check_request(
    request: Request, *, vocabulary_size: int, max_context_tokens: int, classes: int, points: int
) -> None:
    """Raises Rejected if the request could not run to its end in an engine of these sizes, whatever else runs."""
    sampling, context = request.sampling, context_tokens(request)
    if not request.prompt:
        raise Rejected("the prompt has no tokens; send at least one", "prompt")
    if outside := [token for token in request.prompt if not 0 <= token < vocabulary_size]:
        raise Rejected(f"{len(outside)} prompt token ids are outside the vocabulary of {vocabulary_size}", "prompt")
    if sampling.max_tokens < 1:
        raise Rejected(f"max_tokens must be at least 1; found {sampling.max_tokens}", "max_tokens")
    if context > max_context_tokens:
        raise Rejected(
            f"{len(request.prompt)} prompt tokens and max_tokens {sampling.max_tokens} make {context}, the context "
            f"holds {max_context_tokens}; shorten the prompt or lower max_tokens",
            "prompt" if len(request.prompt) >= max_context_tokens else "max_tokens",
        )
    if not 0 <= sampling.temperature < float("inf"):
        raise Rejected(f"temperature must be finite and at least 0; found {sampling.temperature}", "temperature")
    if not 0 < sampling.top_p <= 1:
        raise Rejected(f"top_p must be greater than 0 and at most 1; found {sampling.top_p}", "top_p")
    _check_shaping(sampling, vocabulary_size)
    if not 0 <= request.service_class < classes:
        raise Rejected(
            f"service class {request.service_class} is not one of the plan's {classes}",
            "service_class",
        )
    floor = request.promise.floor
    if floor is not None and not 0 <= floor < points:
        raise Rejected(f"the floor must be one of the ladder's {points} points; found {floor}", "floor")


def _check_shaping(sampling: Sampling, vocabulary_size: int) -> None:
    if sampling.top_k < 0:
        raise Rejected(f"top_k must be at least 1, or 0 for all tokens; found {sampling.top_k}", "top_k")
    if not 0 <= sampling.min_p <= 1:
        raise Rejected(f"min_p must be between 0 and 1; found {sampling.min_p}", "min_p")
    if not 0 < sampling.repetition_penalty < float("inf"):
        raise Rejected(
            f"repetition_penalty must be greater than 0; found {sampling.repetition_penalty}", "repetition_penalty"
        )
    for name, value in (
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        if not math.isfinite(value):
            raise Rejected(f"{name} must be finite; found {value}", name)
    if sampling.top_logprobs is not None and not 0 <= sampling.top_logprobs <= vocabulary_size:
        raise Rejected(
            f"top_logprobs must be between 0 and the vocabulary's {vocabulary_size}; found {sampling.top_logprobs}",
            "top_logprobs",
        )
    if outside := [token for token, _ in sampling.logit_bias if not 0 <= token < vocabulary_size]:
        raise Rejected(
            f"{len(outside)} ids of logit_bias are outside the vocabulary of {vocabulary_size}", "logit_bias"
        )
