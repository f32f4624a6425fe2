"""What the recipe was fitted and measured with is what the pod runs: same tokens, same cost."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prism_runtime.engine.experts_hook import experts_modules
from prism_runtime.kernels.contract import GatedLayer
from prism_runtime.kernels.plan import BATCH, THRESHOLD, PlanTables
from prism_runtime.refactor.checkpoint import permute_shard
from prism_runtime.refactor.fit import RecipeSettings, fit_recipe
from prism_runtime.refactor.masked import MaskedModel
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import PackedModel
from tests.runtime.models import LAYERS, SUB_EXPERTS, VOCABULARY, tiny_model

SETTINGS = RecipeSettings(
    sub_experts=SUB_EXPERTS,
    budgets_permille=(500,),
    fisher_samples=1,
    proposals=100,
    partition_rows=100,
    centred=False,
    compensation="dense",
    rank=3,
)


def text(seed: int, count: int = 8, length: int = 48) -> list[TokenSequence]:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [TokenSequence("text", tuple(row)) for row in ids.tolist()]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_packed_model_at_a_fitted_point_equals_the_masked_model_in_output_and_cost(
    architecture: str, tmp_path: Path
) -> None:
    stock = tiny_model(architecture)
    fitted = fit_recipe(stock, text(1), text(2), SETTINGS)
    masked = MaskedModel(stock)
    masked.permute(fitted.perms)
    stock.save_pretrained(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "permuted")
    layers = [index for index, _ in experts_modules(stock)]
    shard = "model.safetensors"
    permute_shard(
        tmp_path / "source" / shard, tmp_path / "permuted" / shard, dict(zip(layers, fitted.perms, strict=True))
    )
    point = fitted.points[500]
    prefix = PlanTables.uniform([SUB_EXPERTS] * 3, LAYERS, SUB_EXPERTS)
    tables = replace(
        prefix,
        mode=torch.tensor([THRESHOLD, BATCH, 0], dtype=torch.int32),
        tau=point.log_tau.float().expand(3, -1).contiguous(),
        share=torch.full((3, LAYERS), 0.4),
    )
    compensation = {index: list(point.compensation or ()) for index in (0, 1)}
    gates = [
        GatedLayer(gate, {index: one[layer] for index, one in compensation.items()})
        for layer, gate in enumerate(fitted.gates)
    ]
    packed = PackedModel(AutoModelForCausalLM.from_pretrained(tmp_path / "permuted"), tables, gates)

    decode = fitted.method(500)
    batch = replace(decode, mode="batch", share=[0.4] * LAYERS)
    for index, method in enumerate((decode, batch, None)):
        masked.reset()
        packed.plan.reset_counters()
        expected = masked.log_probabilities(text(3), method)
        torch.testing.assert_close(packed.log_probabilities(text(3), index), expected, rtol=1e-3, atol=1e-3)
        assert packed.plan.realised_budget == pytest.approx(masked.realised if method else 1.0, rel=1e-4)
