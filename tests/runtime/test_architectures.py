"""Seven architectures at full budget are the stock model; smaller budgets are the dense model with neurons masked."""

import pytest
import torch
import transformers

from prism_runtime.engine.model import Chunk
from tests.runtime.models import (
    ARCHITECTURES,
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
    logits = tiny_engine(architecture).model.logits([Chunk(0, 0, prompt, 0)])[0]
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
