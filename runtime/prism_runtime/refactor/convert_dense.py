"""A dense Llama-class checkpoint as a Mixtral checkpoint with one expert a layer, which computes the same function.

The router of such a layer has one logit, its softmax is 1, and the expert is the dense MLP: everything that is written
for experts then applies to a dense model. Weights are copied shard by shard, never the whole model at once.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, MixtralConfig

from prism_runtime.refactor.artifact import COPIED
from prism_runtime.refactor.checkpoint import CheckpointRefused, weight_files

INDEX_NAME = "model.safetensors.index.json"

CONVERTIBLE = ("llama", "mistral")
"""Model types whose block is Mixtral's around the MLP. Others norm queries, scale residuals or add biases."""

COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "dtype",
)

MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
UNCHANGED = re.compile(
    r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm)\.weight"
)
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Older libraries stored this table; it follows from the configuration."""


def convert_dense(source: Path, out: Path, advance: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Write the dense checkpoint `source` to the new directory `out` as a Mixtral one with one expert a layer.

    dtypes stay, so logits are bit-equal to the source's; tokenizer and generation configuration are copied. Memory: one
    shard. `advance` is told (shards done, of). `out` appears complete or not at all. Raises CheckpointRefused that
    names the field or tensor that has no Mixtral counterpart.
    """
    if out.exists():
        raise CheckpointRefused(f"'{out}' exists; give a new directory, or remove it first")
    config = mixtral_config(source)
    shards = weight_files(source)
    places = _places(shards)
    _require_complete(places, config.num_hidden_layers, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        target = Path(scratch) / "checkpoint"
        target.mkdir()
        _copy_companions(source, target)
        config.save_pretrained(target)
        weight_map: dict[str, str] = {}
        total = 0
        for done, shard in enumerate(shards):
            advance(done, len(shards))
            tensors = _converted(shard)
            save_file(tensors, target / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
        target.rename(out)
    advance(len(shards), len(shards))


def mixtral_config(source: Path) -> MixtralConfig:
    """The configuration of the one-expert model. Raises CheckpointRefused if it would not compute the same function."""
    try:
        stored = json.loads((source / "config.json").read_bytes())
        dense: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointRefused(f"'{source}' has no readable config.json: {error}") from error
    where = f"'{source / 'config.json'}'"
    if dense.model_type not in CONVERTIBLE:
        raise CheckpointRefused(
            f"{where}: model_type is {dense.model_type!r}; only {' and '.join(CONVERTIBLE)} have a Mixtral "
            f"counterpart. A mixture of experts needs no conversion: give it to 'prism-runtime refactor'"
        )
    if stored.get("quantization_config"):
        raise CheckpointRefused(
            f"{where}: quantization_config is set; quantised weights cannot be partitioned, start from the bfloat16 "
            f"or float32 checkpoint"
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(dense, field, False):
            raise CheckpointRefused(
                f"{where}: {field} is true; Mixtral has no such biases, so only a checkpoint trained without can be "
                f"converted"
            )
    if dense.hidden_act not in ("silu", "swish"):
        raise CheckpointRefused(
            f"{where}: hidden_act is {dense.hidden_act!r}; only 'silu' (also called 'swish') is supported, choose a "
            f"checkpoint trained with it"
        )
    fields = {field: getattr(dense, field) for field in COPIED_FIELDS}
    return MixtralConfig(
        **fields,
        sliding_window=getattr(dense, "sliding_window", None),
        num_local_experts=1,
        num_experts_per_tok=1,
        router_jitter_noise=0.0,
        architectures=["MixtralForCausalLM"],
    )


def _places(shards: list[Path]) -> dict[str, str]:
    """Where every tensor is. Refuses, before anything is written, what has no place in the target."""
    places: dict[str, str] = {}
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            for key in list(shard.keys()):
                where = f"'{key}' in '{path.name}'"
                if key in places:
                    raise CheckpointRefused(
                        f"{where} is also in '{places[key]}'; remove the weight files that do not belong together"
                    )
                if not (UNCHANGED.fullmatch(key) or MLP.fullmatch(key) or RECOMPUTED.fullmatch(key)):
                    reason = "is a bias" if key.endswith(".bias") else "is not a tensor of a plain Llama or Mistral"
                    raise CheckpointRefused(
                        f"{where} {reason}; Mixtral has no place for it, so the conversion would change the model"
                    )
                if (stored := shard.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise CheckpointRefused(
                        f"{where} is stored as {stored}; quantised weights cannot be partitioned, start from the "
                        f"bfloat16 or float32 checkpoint"
                    )
                places[key] = path.name
    return places


def _require_complete(places: dict[str, str], layers: int, source: Path) -> None:
    wanted = {f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(layers) for name in MIXTRAL_NAMES}
    found = {key for key in places if MLP.fullmatch(key)}
    if wanted != found:
        differing = sorted(wanted ^ found)
        raise CheckpointRefused(
            f"'{source}': config.json says num_hidden_layers {layers}, but the weight files "
            f"{'lack' if wanted - found else 'also have'} {differing[0]} ({len(differing)} such tensors); copy the "
            f"checkpoint again"
        )


def _converted(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as shard:
        for key in list(shard.keys()):
            if RECOMPUTED.fullmatch(key):
                continue
            tensor = shard.get_tensor(key)
            if not (match := MLP.fullmatch(key)):
                tensors[key] = tensor
                continue
            block = f"model.layers.{match[1]}.block_sparse_moe."
            tensors[f"{block}experts.0.{MIXTRAL_NAMES[match[2]]}.weight"] = tensor
            if match[2] == "gate":
                tensors[f"{block}gate.weight"] = torch.zeros(1, tensor.shape[1], dtype=tensor.dtype)
    return tensors


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name != INDEX_NAME:
                shutil.copyfile(path, target / path.name)
