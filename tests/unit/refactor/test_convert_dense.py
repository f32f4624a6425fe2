"""A dense checkpoint converted to one expert a layer is the same function, bit for bit, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prism_runtime.__main__ import main
from prism_runtime.refactor.checkpoint import CheckpointRefused
from prism_runtime.refactor.convert_dense import convert_dense

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0},
    "bos_token_id": 5,
    "eos_token_id": [1, 7],
}


def save_dense(
    directory: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any
) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer.json").write_text('{"of": "the source"}')
    return directory


@torch.inference_mode()
def logits(directory: Path, implementation: str = "eager") -> torch.Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory).eval()
    if model.config.model_type == "mixtral":
        model.set_experts_implementation(implementation)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_stock_library_gives_the_logits_of_the_dense_source_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str, implementation: str
) -> None:
    source = save_dense(tmp_path / "dense", dtype=dtype, shard=shard, tie_word_embeddings=tied)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard == "40KB")
    convert_dense(source, tmp_path / "moe")
    expected, found = logits(source), logits(tmp_path / "moe", implementation)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [8, None])
def test_mistral_keeps_its_sliding_window(tmp_path: Path, window: int | None) -> None:
    source = save_dense(tmp_path / "dense", "mistral", sliding_window=window)
    convert_dense(source, tmp_path / "moe")
    assert torch.equal(logits(tmp_path / "moe"), logits(source))


def test_scaled_rotary_positions_are_kept(tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    source = save_dense(tmp_path / "dense", rope_parameters=scaled)
    convert_dense(source, tmp_path / "moe")
    assert torch.equal(logits(tmp_path / "moe"), logits(source))


def test_converted_checkpoint_has_one_expert_and_the_sources_companions(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    convert_dense(source, tmp_path / "moe")
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.architectures, config.num_local_experts, config.num_experts_per_tok) == (
        ["MixtralForCausalLM"],
        1,
        1,
    )
    assert (config.eos_token_id, config.bos_token_id, config.dtype) == ([1, 7], 5, torch.float32)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (source / name).read_bytes()


def test_stored_rotary_table_of_older_checkpoints_is_left_out(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    add_tensor(source, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    convert_dense(source, tmp_path / "moe")
    assert not [key for key in load_file(tmp_path / "moe" / "model.safetensors") if "rotary" in key]


def add_tensor(directory: Path, key: str, tensor: torch.Tensor) -> None:
    weights = directory / "model.safetensors"
    save_file({**load_file(weights), key: tensor}, weights, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, r"config.json': mlp_bias is true; .*trained without"),
        ({"attention_bias": True}, r"config.json': attention_bias is true; .*trained without"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' .* choose a checkpoint"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config is set; .* start from the bfloat16"),
        ({"model_type": "qwen2"}, r"model_type is 'qwen2'; only llama and mistral have a Mixtral counterpart"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers 3, but the weight files lack model\.layers\.2\.mlp\.down_proj"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers 1, but the weight files also have model\.layers\.1\.mlp"),
    ],
)
def test_configuration_without_a_mixtral_counterpart_is_refused_by_field_and_value(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = save_dense(tmp_path / "dense")
    edit_config(source, **changes)
    with pytest.raises(CheckpointRefused, match=message):
        convert_dense(source, tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("model.layers.0.mlp.up_proj.bias", torch.ones(64), r"'model\.layers\.0\.mlp\.up_proj\.bias' .* is a bias"),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(16), r"q_norm\.weight' .* not a tensor of a plain Llama"),
        ("lm_head.weight", torch.ones(96, 48, dtype=torch.int8), r"stored as I8; quantised .* start from the bfloat16"),
    ],
)
def test_tensor_without_a_place_in_mixtral_is_refused_by_name(
    tmp_path: Path, key: str, tensor: torch.Tensor, message: str
) -> None:
    source = save_dense(tmp_path / "dense")
    add_tensor(source, key, tensor)
    with pytest.raises(CheckpointRefused, match=message):
        convert_dense(source, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_weights_of_two_savings_in_one_directory_are_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    (source / "model-00001-of-00001.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointRefused, match=r"is also in 'model-00001-of-00001\.safetensors'; remove"):
        convert_dense(source, tmp_path / "moe")


def test_existing_target_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    with pytest.raises(CheckpointRefused, match="exists; give a new directory"):
        convert_dense(source, tmp_path / "moe")
    assert not list((tmp_path / "moe").iterdir())


def test_command_converts_and_names_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_dense(tmp_path / "dense", shard="40KB")
    assert main(["convert-dense", str(source), str(tmp_path / "moe")]) == 0
    assert f"prism-runtime refactor {tmp_path / 'moe'} --calibration" in capsys.readouterr().out
    assert torch.equal(logits(tmp_path / "moe"), logits(source))


def test_command_says_what_is_wrong_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-dense", str(tmp_path), str(tmp_path / "moe")]) == 2
    assert "has no readable config.json" in capsys.readouterr().err
