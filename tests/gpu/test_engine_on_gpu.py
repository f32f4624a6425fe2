"""The engine with the Triton kernel on a real GPU; skipped where there is none."""

import pytest
import torch

from tests.runtime.models import ARCHITECTURES, prompts, request, run, tiny_engine, tiny_model, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_at_full_budget_are_those_of_the_stock_model_on_the_gpu(architecture: str) -> None:
    texts, expected = prompts([12, 30]), []
    stock = tiny_model(architecture).to("cuda")
    for prompt in texts:
        found = stock.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        expected.append(found[0, len(prompt) :].tolist())
    engine = tiny_engine(architecture, stock=tiny_model(architecture).to("cuda"))
    for name, prompt in zip("ab", texts, strict=True):
        engine.submit(request(name, prompt, max_tokens=6))
    events = run(engine)
    assert [tokens_of(events, name) for name in "ab"] == expected
