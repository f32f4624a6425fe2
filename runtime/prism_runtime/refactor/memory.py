"""How much memory a refactoring needs, from the checkpoint's headers alone."""

from math import prod
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from prism_runtime.refactor.checkpoint import weight_files

FLOAT32, FLOAT64, INT64 = 4, 8, 8
EVALUATION_BATCH = 4
"""Sequences whose log probabilities are held at once: of the full model, of the point, and of one product."""


def memory_needed(source: Path, *, whole_experts: bool, tokens: int, length: int = 256) -> dict[str, int]:
    """Bytes by what they hold. Raises CheckpointRefused.

    whole_experts  the policy reads every expert beside the model, and rows of the calibration text
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
    return (captured if whole_experts else {}) | {
        "model in float32": FLOAT32 * sum(elements.values()),
        "calibration sums": FLOAT64 * neurons * (config.num_experts_per_tok + 2),
        "evaluation batch": FLOAT32 * 3 * EVALUATION_BATCH * length * config.vocab_size,
    }


def _elements(shard: Path) -> dict[str, int]:
    with safe_open(shard, framework="pt") as file:
        return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
