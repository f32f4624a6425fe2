"""Packed projections: the same products as torch's own, where they are worth it and nowhere else."""

import pytest
import torch
from torch import nn

from prism_runtime.engine import linear_hook
from prism_runtime.engine.linear_hook import PackedLinear, pack_linears
from tests.runtime.models import ARCHITECTURES, chunk, prompts, tiny_engine, tiny_model


def test_linear_hook_is_written_for_torch_2_15() -> None:
    assert torch.__version__.startswith("2.15."), (
        "read torch's mkldnn operators again, then change prism_runtime/engine/linear_hook.py and this test"
    )
    assert linear_hook.available()


@pytest.mark.parametrize("rows", [1, 3, 4, 32, 200])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_packed_projection_gives_what_the_projection_gives(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(256, 1100, bias=bias)
    hidden = torch.randn(2, rows, 256)
    torch.testing.assert_close(PackedLinear(linear)(hidden), linear(hidden), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_few_products_are_left_to_torch() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    packed = PackedLinear(linear)
    packed.packed.zero_()
    many = torch.randn(linear_hook.LEAST_PRODUCTS // 64**2, 64)
    few = many[1:]
    assert torch.equal(packed(few), linear(few))
    assert not torch.allclose(packed(many), linear(many))


def test_weights_are_kept_twice_only_where_few_rows_are_left_to_torch() -> None:
    side = round(linear_hook.LEAST_PRODUCTS**0.5)
    large, small = nn.Linear(side, side), nn.Linear(side, side - 1)
    assert PackedLinear(large).weight is None
    assert PackedLinear(small).weight is small.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_a_float32_model_are_packed_and_no_others(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3_moe").to(dtype)
    projections = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    pack_linears(model)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed == (projections if dtype == torch.float32 else [])
    assert projections


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_every_architecture_runs_with_all_of_its_projections_packed(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_hook, "LEAST_PRODUCTS", 1)
    (prompt,) = prompts([23])
    expected = tiny_model(architecture)(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    logits = tiny_engine(architecture).model.logits([chunk(0, 0, prompt, 0)])[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
