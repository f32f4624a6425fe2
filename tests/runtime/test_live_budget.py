"""Budgets that differ inside a batch and change between steps."""

import pytest
import torch

from prism_runtime.engine.types import Plan, Token
from tests.runtime.models import (
    COUNTS,
    chunk,
    endings,
    masked_model,
    prompts,
    request,
    run,
    stock_greedy,
    tiny_engine,
    tiny_model,
    tokens_of,
)

HALF, FULL = 1, 2


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_classes_at_different_points_share_a_batch_and_each_gets_its_own_logits(architecture: str) -> None:
    engine = tiny_engine(architecture, classes=3)
    engine.model.set_points([FULL, HALF, 0])
    texts = prompts([12, 9, 11])
    logits = engine.model.logits([chunk(slot, 0, text, slot) for slot, text in enumerate(texts)])
    for row, (text, count) in enumerate(zip(texts, (COUNTS[FULL], COUNTS[HALF], COUNTS[0]), strict=True)):
        with torch.inference_mode():
            expected = masked_model(architecture, count)(torch.tensor([text]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_class_at_full_keeps_the_stock_tokens_while_its_neighbours_budget_changes_every_step() -> None:
    engine, stock = tiny_engine(classes=2), tiny_model("qwen3_moe")
    gold, bronze = prompts([17, 12])
    engine.submit(request("gold", gold, max_tokens=24, service_class=0))
    engine.submit(request("bronze", bronze, max_tokens=24, service_class=1))
    plans = [Plan(version, (FULL, version % len(COUNTS))) for version in range(1, 40)]
    events = run(engine, plans)
    assert tokens_of(events, "gold") == stock_greedy(stock, gold, 24)
    assert tokens_of(events, "bronze") != stock_greedy(stock, bronze, 24)


def test_every_token_carries_the_one_plan_version_and_point_of_its_step() -> None:
    engine = tiny_engine(classes=2)
    for i, prompt in enumerate(prompts([5, 9, 14, 3])):
        engine.submit(request(f"r{i}", prompt, max_tokens=12, service_class=i % 2))
    version = 0
    while engine.has_work:
        version += 1
        plan = Plan(version, (version % 3, (version + 1) % 3))
        engine.set_plan(plan)
        report = engine.step()
        assert report.plan == plan == engine.plan
        for event in report.events:
            if isinstance(event, Token):
                service_class = int(event.request_id[1:]) % 2
                assert (event.plan_version, event.point) == (version, plan.class_point[service_class])
    assert version >= 12


def test_plan_set_during_a_step_is_live_only_from_the_next_one() -> None:
    engine = tiny_engine()
    engine.submit(request("a", prompts([6])[0], max_tokens=3))
    stock_forward = engine.model.model.base_model.forward

    def forward_with_a_directive(*args: object, **kwargs: object) -> object:
        engine.set_plan(Plan(7, (0,)))
        return stock_forward(*args, **kwargs)

    engine.model.model.base_model.forward = forward_with_a_directive
    first, second = engine.step(), engine.step()
    assert (first.plan.version, second.plan.version) == (0, 7)
    assert [e.plan_version for r in (first, second) for e in r.events if isinstance(e, Token)] == [0, 7]


def test_idle_step_swaps_the_plan_and_reports_no_work() -> None:
    engine = tiny_engine()
    engine.set_plan(Plan(3, (0,)))
    report = engine.step()
    assert report.idle
    assert report.events == ()
    assert engine.plan == report.plan == Plan(3, (0,))


@pytest.mark.parametrize("class_point", [(), (0, 0), (3,), (-1,)])
def test_plan_that_does_not_fit_the_tables_is_refused_and_the_live_one_stays(class_point: tuple[int, ...]) -> None:
    engine = tiny_engine()
    with pytest.raises(ValueError, match="must hold 1 ladder indices from 0 to 2"):
        engine.set_plan(Plan(9, class_point))
    engine.submit(request("a", prompts([4])[0], max_tokens=1))
    assert endings(run(engine)) == {"a": "length"}
    assert engine.plan.version == 0
