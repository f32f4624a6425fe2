"""How much memory a refactoring needs, from the checkpoint's headers alone."""

from math import prod
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from prism_runtime.refactor.checkpoint import weight_files

FLOAT32, FLOAT64, INT64 = 4, 8, 8
EVALUATION_BATCH = 4
"""Sequences whose log probabilities are held at once: of the full model, of the point, and of one product."""


LOCKSTEP_STATES = 10
"""Of every token, dense and sparse, beside each other in a layer: residuals, queries, keys, values, outputs, targets.

Measured: 10.2 to 14 times one hidden state, fewer the longer the text.
"""
LOCKSTEP_BYTES, LOCKSTEP_SHARE = 2 * 2**30, 4
"""What compensation may hold: 2 GiB or a quarter of the model, whichever is more."""


def lockstep_sequences(hidden: int, length: int, model_bytes: int) -> int:
    """How many token sequences a compensation may be fitted on; `model_bytes` in float32."""
    allowed = max(LOCKSTEP_BYTES, model_bytes // LOCKSTEP_SHARE)
    return max(1, allowed // lockstep_bytes(hidden, length))


def lockstep_bytes(hidden: int, tokens: int) -> int:
    """Bytes that a compensation fitted on so many tokens holds."""
    return LOCKSTEP_STATES * 2 * tokens * hidden * FLOAT32


def memory_needed(
    source: Path, *, whole_experts: bool, compensated: bool, tokens: int, length: int = 256
) -> dict[str, int]:
    """Bytes by what they hold. Raises CheckpointRefused.

    whole_experts  the policy reads every expert beside the model, and rows of the calibration text
    compensated    a compensation is fitted, on as much text as `lockstep_sequences` lets it
    tokens         of the calibration text, at most; `length` is that of a token sequence
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False).get_text_config()
    elements = {name: size for shard in weight_files(source) for name, size in _elements(shard).items()}
    # Sums per neuron, one by rank and two over ranks; an expert's gate projection is one row of H a neuron.
    neurons = sum(size for name, size in elements.items() if ".experts." in name) // (3 * config.hidden_size)
    layers = config.num_hidden_layers
    row = FLOAT32 * (config.hidden_size + 1) + (FLOAT32 + INT64) * config.num_experts_per_tok
    # The pass that captures rows holds those of all layers; later stages read two layers at a time.
    captured = {
        "experts in the order of the partition": FLOAT32 * 3 * config.hidden_size * neurons,
        "calibration rows": tokens * layers * row,
    }
    model = FLOAT32 * sum(elements.values())
    fitted_on = min(tokens, length * lockstep_sequences(config.hidden_size, length, model))
    lockstep = {"text of the compensation": lockstep_bytes(config.hidden_size, fitted_on)}
    return (
        (captured if whole_experts else {})
        | (lockstep if compensated else {})
        | {
            "model in float32": model,
            "calibration sums": FLOAT64 * neurons * (config.num_experts_per_tok + 2),
            "evaluation batch": FLOAT32 * 3 * EVALUATION_BATCH * length * config.vocab_size,
        }
    )


def _elements(shard: Path) -> dict[str, int]:
    with safe_open(shard, framework="pt") as file:
        return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
