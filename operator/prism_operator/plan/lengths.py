"""Moments of request lengths from counts in 4 x 4 cells.

Means hide a mix of short and long requests, and work is not linear in lengths: a long output holds its context for
longer. Pods count finished requests in cells that are a factor of four wide; here old counts fade with a half-life, a
cell stands for the geometric middle of its bounds, and all middles are scaled so that the means are those measured.
"""

from collections.abc import Sequence

from prism_operator.plan.types import Lengths

HALF_LIFE_S = 600.0
ENOUGH = 20.0
"""Below this (fading) count of requests the cells say less than the assumption of exponential lengths."""
PROMPT_MIDDLES = (128.0, 512.0, 2048.0, 8192.0)
OUTPUT_MIDDLES = (16.0, 64.0, 256.0, 1024.0)
INSIDE_CELL = 1.155
"""E[x^2] / E[x]^2 of a log-uniform length over a factor of four: ln 4 * (4^2 - 1) / (2 * (4 - 1)^2)."""
INVERSE_INSIDE_CELL = 1.171
"""E[1/x] * E[x] of the same: (3 / (2 * ln 4))^2."""


def faded(cells: Sequence[float], counted: Sequence[int], elapsed_s: float) -> tuple[float, ...]:
    """Cells after `elapsed_s` more, with what was counted in it; either may be empty for none."""
    if not cells:
        return tuple(float(count) for count in counted)
    left = 0.5 ** (elapsed_s / HALF_LIFE_S)
    if not counted:
        return tuple(count * left for count in cells)
    return tuple(count * left + new for count, new in zip(cells, counted, strict=True))


def with_moments(prompt_tokens: float, output_tokens: float, cells: Sequence[float]) -> Lengths:
    """Lengths with these means, and the moments that the cells show if they hold enough requests."""
    total = sum(cells)
    if total < ENOUGH or not output_tokens:
        return Lengths(prompt_tokens, output_tokens)
    shares = [
        (count / total, prompt, output)
        for count, (prompt, output) in zip(
            cells, ((prompt, output) for prompt in PROMPT_MIDDLES for output in OUTPUT_MIDDLES), strict=True
        )
        if count
    ]
    prompt_scale = prompt_tokens / sum(share * prompt for share, prompt, _ in shares)
    output_scale = output_tokens / sum(share * output for share, _, output in shares)
    return Lengths(
        prompt_tokens,
        output_tokens,
        prompt_squared=INSIDE_CELL * prompt_scale**2 * sum(share * prompt**2 for share, prompt, _ in shares),
        output_squared=INSIDE_CELL * output_scale**2 * sum(share * output**2 for share, _, output in shares),
        output_inverse=INVERSE_INSIDE_CELL / output_scale * sum(share / output for share, _, output in shares),
        product=prompt_scale * output_scale * sum(share * prompt * output for share, prompt, output in shares),
    )
