"""Next tokens from logits, each row by its own request's settings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_runtime.engine.types import LogProbabilities, Sampling


@dataclass(frozen=True, slots=True)
class History:
    """Token ids that a row's penalties count."""

    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()


NO_HISTORY = History()


def sample(
    logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float], histories: Sequence[History] | None = None
) -> list[int]:
    """One token id per row of `logits` [R, V] float32.

    Bias and penalties come first, then temperature, top_k, top_p and min_p. Rows of temperature 0 take the argmax. The
    others invert the cumulative distribution at their `draws` entry, uniform in [0, 1): the token depends on the row's
    own logits, history and draw, never on its batch mates.
    """
    logits = _reshaped(logits, settings, histories or [NO_HISTORY] * len(settings))
    tokens = _argmax(logits)
    chosen = [row for row, sampling in enumerate(settings) if sampling.temperature > 0]
    if chosen:
        index = torch.tensor(chosen, device=logits.device)
        tokens[index] = _invert(logits[index], [settings[row] for row in chosen], [draws[row] for row in chosen])
    ids: list[int] = tokens.tolist()
    return ids


def _argmax(logits: Tensor) -> Tensor:
    """The first of each row's largest logits. On a CPU NumPy is the faster way to them."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def log_probabilities(logits: Tensor, token: int, top: int) -> LogProbabilities:
    """Of `token` and of the `top` most likely ones, from one row of logits [V]."""
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(top)
    return LogProbabilities(float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _invert(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # Shifted by the maximum before the division: a tiny temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / column([s.temperature for s in settings])
    probabilities = scaled.softmax(-1)
    if any(s.top_k for s in settings):
        probabilities = _most_likely(probabilities, [s.top_k for s in settings])
    top_p = column([s.top_p for s in settings])
    if bool((top_p < 1).any()):
        probabilities = _nucleus(probabilities, top_p)
    if any(s.min_p for s in settings):
        least = column([s.min_p for s in settings]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    cumulative = probabilities.cumsum(-1)
    # The draw is scaled to the total, which the nucleus cut makes less than 1. In double precision the product stays
    # below the total for every draw below 1, so the first larger sum exists and its token has positive probability.
    return torch.searchsorted(cumulative, column(draws) * cumulative[:, -1:], right=True)[:, 0]


def _reshaped(logits: Tensor, settings: Sequence[Sampling], histories: Sequence[History]) -> Tensor:
    """Logits with each row's bias and penalties; the rows of others are not touched."""
    rows = [row for row, sampling in enumerate(settings) if sampling.reshapes]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        sampling, history, line = settings[row], histories[row], logits[row]
        if sampling.repetition_penalty != 1.0 and (seen := sorted({*history.prompt, *history.answer})):
            at = torch.tensor(seen, device=logits.device)
            values = line[at]
            line[at] = torch.where(
                values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
            )
        if (sampling.presence_penalty or sampling.frequency_penalty) and history.answer:
            at, times = torch.tensor(history.answer, device=logits.device).unique(return_counts=True)
            line[at] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if sampling.logit_bias:
            ids, bias = zip(*sampling.logit_bias, strict=True)
            line[torch.tensor(ids, device=logits.device)] += torch.tensor(bias, device=logits.device)
    return logits


def _most_likely(probabilities: Tensor, top_k: Sequence[int]) -> Tensor:
    """Zero all but each row's `top_k` most likely tokens (all for 0) and those as likely as the last of them."""
    size = probabilities.shape[-1]
    last = torch.tensor([min(k or size, size) - 1 for k in top_k], device=probabilities.device)[:, None]
    least = probabilities.sort(-1, descending=True).values.gather(-1, last)
    return probabilities.masked_fill(probabilities < least, 0)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches `top_p`; at least one remains."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(-1, index, kept)
