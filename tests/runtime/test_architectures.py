"""Seven architectures at full budget are the stock model; smaller budgets are the dense model with neurons masked."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from prism_runtime.engine.experts_hook import UnsupportedModel, pack
from tests.runtime.models import (
    ARCHITECTURES,
    BASE,
    COUNTS,
    SUB_EXPERTS,
    chunk,
    masked_model,
    prompts,
    request,
    run,
    stock_greedy,
    tiny_engine,
    tiny_model,
    tokens_of,
)


def test_experts_hook_is_written_for_transformers_5_23() -> None:
    assert transformers.__version__.startswith("5.23."), (
        "experts_hook.py uses private API: check it, then move this pin"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_budget_gives_the_logits_of_the_stock_model(architecture: str) -> None:
    (prompt,) = prompts([23])
    with torch.inference_mode():
        expected = tiny_model(architecture)(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    logits = tiny_engine(architecture).model.logits([chunk(0, 0, prompt, 0)])[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuous_batching_at_full_budget_gives_the_greedy_tokens_of_the_stock_model(architecture: str) -> None:
    engine, stock = tiny_engine(architecture, prefill_tokens_per_step=16), tiny_model(architecture)
    texts = prompts([3, 21, 1, 30, 9, 14])
    for i, prompt in enumerate(texts):
        engine.submit(request(f"r{i}", prompt, max_tokens=10 + i))
    events = run(engine)
    for i, prompt in enumerate(texts):
        assert tokens_of(events, f"r{i}") == stock_greedy(stock, prompt, 10 + i), f"prompt {i}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("point", range(len(COUNTS) - 1))
def test_smaller_budget_gives_the_logits_of_the_dense_model_without_the_other_neurons(
    architecture: str, point: int
) -> None:
    (prompt,) = prompts([23])
    engine = tiny_engine(architecture)
    full = engine.model.logits([chunk(0, 0, prompt, 0)])[0]
    engine.model.set_points([point])
    logits = engine.model.logits([chunk(0, 0, prompt, 0)])[0]
    with torch.inference_mode():
        stock = masked_model(architecture, COUNTS[point])
        expected = stock(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - full).abs().max() > 0.01


@pytest.mark.parametrize("slots", [(0, 2, 1, 3), (3, 1, 2, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("lengths", [(12, 9, 11, 10), (30, 4, 25, 5)])
def test_chunks_of_any_length_in_any_slots_get_their_own_logits(slots: tuple[int, ...], lengths: list[int]) -> None:
    engine, texts = tiny_engine(), prompts(lengths)
    together = engine.model.logits([chunk(slot, 0, text, 0) for slot, text in zip(slots, texts, strict=True)])
    following = engine.model.logits([chunk(slot, len(text), (7,), 0) for slot, text in zip(slots, texts, strict=True)])
    for row, text in enumerate(texts):
        alone = tiny_engine()
        torch.testing.assert_close(together[row], alone.model.logits([chunk(0, 0, text, 0)])[0], rtol=1e-4, atol=1e-4)
        expected = alone.model.logits([chunk(0, len(text), (7,), 0)])[0]
        torch.testing.assert_close(following[row], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_engine_follows_the_bfloat16_stock_model() -> None:
    stock = tiny_model("qwen3_moe").bfloat16()
    (prompt,) = prompts([20])
    with torch.inference_mode():
        expected = stock(torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    logits = tiny_engine(stock=tiny_model("qwen3_moe").bfloat16()).model.logits([chunk(0, 0, prompt, 0)])[0]
    assert torch.corrcoef(torch.stack((logits, expected)))[0, 1] > 0.999


def test_realised_budget_is_the_share_of_sub_experts_that_ran() -> None:
    engine = tiny_engine()
    for point, count in enumerate(COUNTS):
        engine.model.set_points([point])
        engine.model.plan.reset_counters()
        engine.model.logits([chunk(0, 0, prompts([9])[0], 0), chunk(1, 0, prompts([6])[0], 0)])
        assert engine.model.plan.realised_budget == count / SUB_EXPERTS


def test_packed_model_refuses_stock_experts_and_saving(tmp_path: Path) -> None:
    model = tiny_engine().model.model
    with pytest.raises(RuntimeError, match="packed into sub-experts"):
        model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="copy the artifact"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_packing_leaves_no_second_copy_of_the_experts() -> None:
    stock = sum(parameter.numel() for parameter in tiny_model("qwen3_moe").parameters())
    packed = tiny_engine("qwen3_moe").model.model
    tensors = [*packed.named_parameters(), *packed.named_buffers()]
    sizes = [tensor.numel() for name, tensor in tensors if not name.endswith(".packed")]
    assert stock <= sum(sizes) < 1.01 * stock


def test_experts_that_cannot_be_cut_evenly_are_refused_before_the_model_is_changed() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(UnsupportedModel, match=r"32 neurons an expert cannot be cut into 5 .* possible: \[1, 2, 4"):
        pack(model, 5)
    assert model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_attention_that_the_engine_cannot_mask_is_refused_by_its_name() -> None:
    model = tiny_model("gpt_oss")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModel, match=r"type \['chunked_attention'\] cannot be served; known are \['full_att"):
        tiny_engine(stock=model)


def test_model_without_fused_experts_is_refused() -> None:
    config = AutoConfig.for_model("llama", **BASE)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no fused experts"):
        pack(AutoModelForCausalLM.from_config(config), 4)
