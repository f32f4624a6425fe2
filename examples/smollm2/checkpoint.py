"""A Llama in a GGUF file as a plain bfloat16 checkpoint: names, rotary order, configuration and tokenizer."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from examples.smollm2.gguf import GgufFile

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3


def write_checkpoint(source: GgufFile, target: Path) -> None:
    """Write weights, configuration and tokenizer into the empty directory `target`."""
    config = _config(source)
    tensors: dict[str, Tensor] = {}
    for name in source.tensors:
        tensor = torch.from_numpy(source.read(name))
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _split_halves(tensor, config.head_dim)
        tensors[_name(name)] = tensor.bfloat16().contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(target)
    _tokenizer(source).save_pretrained(target)


def _name(stored: str) -> str:
    if stored in OUTER_NAMES:
        return OUTER_NAMES[stored]
    _, layer, part, _ = stored.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def _split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from GGUF's rotary pairs (0, 0', 1, 1', ..) to the library's halves (0, 1, .., 0', 1', ..)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _config(source: GgufFile) -> LlamaConfig:
    def field(name: str) -> Any:
        return source.metadata[f"llama.{name}"]

    def token(name: str) -> int:
        return int(source.metadata[f"tokenizer.ggml.{name}_token_id"])

    heads, hidden = field("attention.head_count"), field("embedding_length")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("vocab_size"),
        hidden_size=hidden,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=hidden // heads,
        # Single precision in the file; the shortest decimal of it is what the authors wrote.
        rms_norm_eps=float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        max_position_embeddings=field("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in source.tensors,
        bos_token_id=token("bos"),
        eos_token_id=token("eos"),
        pad_token_id=token("padding"),
        dtype="bfloat16",
    )


def _tokenizer(source: GgufFile) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token; GGUF calls this pre-tokenizer 'smollm'."""
    entries = {name: source.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in entries["merges"])]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(entries["tokens"])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(entries["tokens"], entries["token_type"], strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(role: str) -> str:
        return str(entries["tokens"][source.metadata[f"tokenizer.ggml.{role}_token_id"]])

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=source.metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=source.metadata["llama.context_length"],
    )
