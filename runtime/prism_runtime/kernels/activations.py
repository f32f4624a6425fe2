"""The activations that compiled kernels know, by number."""

from functools import lru_cache

import torch

from prism_runtime.kernels.contract import Activation

SILU, CLAMPED = 0, 1
"""silu(gate) * up, and GPT-OSS's clamped form (transformers' GptOssExperts: limit 7, alpha 1.702)."""


class UnsupportedActivation(ValueError):
    """The experts' activation is none that compiled kernels compute."""


@lru_cache(maxsize=64)
def recognise(activation: Activation) -> int:
    """Which of the programs' activations this function is, by what it computes. Raises UnsupportedActivation."""
    gate, up = (axis.reshape(-1) for axis in torch.meshgrid(*[torch.linspace(-9, 9, 37)] * 2, indexing="ij"))
    found = activation(gate, up)
    clamped = gate.clamp(max=7.0)
    known = {
        SILU: torch.nn.functional.silu(gate) * up,
        CLAMPED: (up.clamp(-7.0, 7.0) + 1) * clamped * torch.sigmoid(1.702 * clamped),
    }
    for kind, expected in known.items():
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return kind
    raise UnsupportedActivation(
        "the experts' activation is neither silu(gate) * up nor GPT-OSS's clamped form with limit 7 and alpha 1.702; "
        "use the kernel 'reference' for this model"
    )
