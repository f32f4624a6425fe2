"""Neuron permutation of a Hugging Face checkpoint, key by key, without loading the model.

Permuting an expert's neurons (rows of its gate and up projection, columns of its down projection) changes no output, so
the permuted checkpoint is one that the stock library loads. Names, shapes, dtypes and metadata stay; the inverse
permutation therefore restores the source byte for byte.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

EXPERT_ROWS = re.compile(r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(?:gate_proj|up_proj|w1|w3)\.(?:weight|bias)$")
EXPERT_COLUMNS = re.compile(r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(?:down_proj|w2)\.weight$")
FUSED_PAIRS = re.compile(r"layers\.(\d+)\.\w+\.experts\.(gate_up_proj|gate_up_proj_bias)$")
FUSED_ROWS = re.compile(r"layers\.(\d+)\.\w+\.experts\.down_proj$")
"""GPT-OSS: [E, H, 2C] and [E, 2C] with interleaved gate and up columns; [E, C, H]."""


class CheckpointRefused(ValueError):
    """The checkpoint's experts are not stored as plain floating-point tensors of a known layout."""


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors shards. Raises CheckpointRefused if there is none."""
    if not (shards := sorted(directory.glob("model*.safetensors"))):
        raise CheckpointRefused(f"'{directory}' has no model*.safetensors; save the model in safetensors format first")
    return shards


def permute_shard(source: Path, target: Path, perms: Mapping[int, Tensor]) -> set[int]:
    """Write `source` to `target` with the neurons of each decoder layer in `perms` ([E, C], new -> old) permuted.

    Returns the layers of which this shard held expert weights. Raises CheckpointRefused for quantised experts.
    """
    tensors: dict[str, Tensor] = {}
    layers: set[int] = set()
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata()
        for key in list(shard.keys()):
            tensors[key] = shard.get_tensor(key)
            layer = _layer_of(key)
            if layer is not None and layer in perms:
                if not tensors[key].is_floating_point() or tensors[key].element_size() < 2:
                    raise CheckpointRefused(
                        f"'{key}' in '{source.name}' is {tensors[key].dtype}; quantised experts cannot be partitioned, "
                        f"start from the bfloat16 checkpoint"
                    )
                tensors[key] = _permute(key, tensors[key], perms[layer].long())
                layers.add(layer)
    save_file(tensors, target, metadata=metadata)
    return layers


def _layer_of(key: str) -> int | None:
    for pattern in (EXPERT_ROWS, EXPERT_COLUMNS, FUSED_PAIRS, FUSED_ROWS):
        if match := pattern.search(key):
            return int(match[1])
    return None


def _permute(key: str, tensor: Tensor, perm: Tensor) -> Tensor:
    if match := EXPERT_ROWS.search(key):
        return tensor[perm[int(match[2])]].contiguous()
    if match := EXPERT_COLUMNS.search(key):
        return tensor[:, perm[int(match[2])]].contiguous()
    experts, neurons = perm.shape
    expert = torch.arange(experts)[:, None]
    if FUSED_ROWS.search(key):
        return tensor[expert, perm]
    pairs = tensor.unflatten(-1, (neurons, 2))
    if FUSED_PAIRS.search(key) and tensor.ndim == 2:
        return pairs[expert, perm].flatten(1)
    columns = pairs.movedim(-2, 1)  # [E, C, H, 2]: the neuron index next to the expert's
    return columns[expert, perm].movedim(1, -2).flatten(-2).contiguous()
