"""Next tokens from logits, each row by its own request's settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_runtime.engine.types import Sampling


def sample(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """One token id per row of `logits` [R, V] float32.

    Rows of temperature 0 take the argmax. The others invert the cumulative distribution at their `draws` entry, uniform
    in [0, 1): a row's token depends on its own logits and draw, never on its batch mates.
    """
    tokens = logits.argmax(-1)
    chosen = [row for row, sampling in enumerate(settings) if sampling.temperature > 0]
    if chosen:
        index = torch.tensor(chosen, device=logits.device)
        tokens[index] = _invert(logits[index], [settings[row] for row in chosen], [draws[row] for row in chosen])
    ids: list[int] = tokens.tolist()
    return ids


def _invert(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # Shifted by the maximum before the division: a tiny temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / column([s.temperature for s in settings])
    probabilities = scaled.softmax(-1)
    top_p = column([s.top_p for s in settings])
    if bool((top_p < 1).any()):
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    # The draw is scaled to the total, which the nucleus cut makes less than 1. In double precision the product stays
    # below the total for every draw below 1, so the first larger sum exists and its token has positive probability.
    return torch.searchsorted(cumulative, column(draws) * cumulative[:, -1:], right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches `top_p`; at least one remains."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(-1, index, kept)
