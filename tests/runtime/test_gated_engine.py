"""The engine at points that a gate selects for: what the kernel is shown, independence of rows, held budgets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prism_runtime.engine.drift import DriftGuard, DriftSettings
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.experts_hook import PackedLayer, bind_gates, block_norms
from prism_runtime.kernels.contract import GatedLayer
from prism_runtime.kernels.plan import THRESHOLD, PlanTables
from tests.runtime.gated import made_up_gates
from tests.runtime.models import (
    ARCHITECTURES,
    COUNTS,
    LAYERS,
    SUB_EXPERTS,
    prompts,
    request,
    run,
    tiny_manifest,
    tiny_model,
    tokens_of,
)

EVERYTHING = -1e9


def gated_engine(architecture: str = "qwen3_moe", tau: float = 0.0, **settings: int) -> Engine:
    """The tiny ladder with its second point, b500, by threshold; every gate output is evaluated."""
    manifest, model = tiny_manifest(), tiny_model(architecture)
    prefix = PlanTables.uniform(COUNTS, LAYERS, SUB_EXPERTS)
    mode = prefix.mode.clone()
    mode[1] = THRESHOLD
    tables = replace(prefix, mode=mode, tau=torch.full_like(prefix.tau, tau))
    gates = made_up_gates(manifest.shape, kappa=None, sensitive=False)
    layers = [GatedLayer(gate, {}) for gate in gates]
    settings = {"max_sequences": 4, "max_context_tokens": 96, **settings}
    engine = Engine(model, tables, manifest, tokenizer=None, gates=layers, **settings)
    engine.model.set_points([1] * len(engine.plan.class_point))
    return engine


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt_oss", "mixtral", "olmoe"}))
def test_threshold_below_every_score_runs_the_full_model(architecture: str) -> None:
    (prompt,) = prompts([30])
    tokens = []
    for tau, point in ((EVERYTHING, 1), (0.0, 2)):
        engine = gated_engine(architecture, tau)
        engine.model.set_points([point])
        engine.submit(request("a", prompt, max_tokens=6))
        tokens.append(tokens_of(run(engine), "a"))
    assert len(tokens[0]) == 6
    assert tokens[0] == tokens[1]


def watch_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """A list that grows by the `residual_rms` that every layer's kernel is shown."""
    shown: list[Tensor | None] = []
    for module in engine.model.model.modules():
        if isinstance(module, PackedLayer):

            def spy(*arguments: object, residual_rms: Tensor | None, kernel=module._kernel) -> Tensor:
                shown.append(residual_rms)
                return kernel(*arguments, residual_rms=residual_rms)

            monkeypatch.setattr(module, "_kernel", spy)
    return shown


def test_kernel_is_shown_the_size_of_the_residual_before_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts([17])
    engine = gated_engine(tau=EVERYTHING)
    shown = watch_kernels(engine, monkeypatch)
    engine.submit(request("a", prompt, max_tokens=1))
    run(engine)

    stock, expected = tiny_model("qwen3_moe"), []
    for norm in block_norms(stock):
        norm.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0][0].square().mean(-1).sqrt()))
    stock(torch.tensor([prompt]), use_cache=False)
    assert len(shown) == LAYERS
    for found, wanted in zip(shown, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_at_prefixes_are_not_measured_and_a_model_without_gates_has_no_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = gated_engine()
    shown = watch_kernels(engine, monkeypatch)
    engine.model.set_points([2])
    engine.submit(request("a", prompts([9])[0], max_tokens=2))
    run(engine)
    assert shown == [None] * (2 * LAYERS)
    tables = PlanTables.uniform(COUNTS, LAYERS, SUB_EXPERTS)
    prefixes = Engine(tiny_model("qwen3_moe"), tables, tiny_manifest(), None, max_context_tokens=64)
    assert not any(norm._forward_pre_hooks for norm in block_norms(prefixes.model.model))


def test_tokens_at_a_threshold_do_not_depend_on_who_else_runs() -> None:
    texts = prompts([11, 23, 8, 17])
    alone = []
    for i, prompt in enumerate(texts):
        engine = gated_engine(classes=2)
        engine.drift = DriftGuard({})
        engine.submit(request(f"r{i}", prompt, max_tokens=10))
        alone.append(tokens_of(run(engine), f"r{i}"))
    engine = gated_engine(classes=2)
    engine.drift = DriftGuard({})
    engine.model.set_points([1, 2])
    for i, prompt in enumerate(texts):
        engine.submit(request(f"r{i}", prompt, max_tokens=10, service_class=i % 2))
    events = run(engine)
    for i in (0, 2):
        assert tokens_of(events, f"r{i}") == alone[i]


def test_engine_holds_the_nominal_budget_of_a_threshold_that_does_not_fit_the_traffic() -> None:
    realised = {}
    for guarded in (False, True):
        engine = gated_engine(tau=0.4, prefill_tokens_per_step=64)
        settings = DriftSettings(window_tokens=256, period_tokens=32, limit=4.0 if guarded else 1e-9)
        engine.drift = DriftGuard({1: 0.5}, settings)
        for round_ in range(3):
            engine.model.plan.reset_counters()
            for i, prompt in enumerate(prompts([90] * 16, seed=round_)):
                engine.submit(request(f"r{round_}.{i}", prompt, max_tokens=2))
            run(engine)
        realised[guarded] = engine.model.plan.realised_budget
        assert engine.drift.realised(1) is not None
        assert engine.model.plan.shift[[0, 2]].tolist() == [0, 0]
    assert abs(realised[False] / 0.5 - 1) > 0.1
    assert realised[True] == pytest.approx(0.5, rel=0.02)


def test_gates_that_do_not_fit_the_model_are_refused() -> None:
    manifest = tiny_manifest()
    gates = [GatedLayer(gate, {}) for gate in made_up_gates(manifest.shape)]
    engine = gated_engine()
    with pytest.raises(ValueError, match="there are gates for 1 MoE layers, the model has 2"):
        bind_gates(engine.model.model, gates[:1])
    narrow = manifest.shape.model_copy(update={"hidden": 24})
    other = [GatedLayer(gate, {}) for gate in made_up_gates(narrow)]
    with pytest.raises(
        ValueError, match=r"gate of MoE layer 0 has shape \[8, 4, 24\], its sub-experts need \[8, 4, 48\]"
    ):
        bind_gates(engine.model.model, other)
