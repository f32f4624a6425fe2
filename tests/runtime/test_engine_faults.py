"""One request's trouble ends one request: bad input, cancels, forwards that raise."""

import threading
from typing import Any

import pytest
import torch

from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.types import Finished, FinishReason, Overloaded, Promise, Rejected, Token
from tests.runtime.models import (
    VOCABULARY,
    endings,
    prompts,
    request,
    run,
    stock_greedy,
    tiny_engine,
    tiny_model,
    tokens_of,
)

POISON = 5
"""A token id that makes the sabotaged forward raise."""


def sabotage(engine: Engine, spoil: Any) -> None:
    base = engine.model.model.base_model
    stock_forward = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return spoil(stock_forward, *args, **kwargs)

    base.forward = forward


def raise_on_poison(stock_forward: Any, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    if bool((input_ids == POISON).any()):
        raise RuntimeError("secret user text")
    return stock_forward(*args, input_ids=input_ids, **kwargs)


def clean_prompts(lengths: list[int]) -> list[tuple[int, ...]]:
    return [tuple(6 if token == POISON else token for token in prompt) for prompt in prompts(lengths)]


@pytest.mark.parametrize(
    ("bad", "parameter"),
    [
        (request("bad", ()), "prompt"),
        (request("bad", (3, VOCABULARY)), "prompt"),
        (request("bad", (3, -1)), "prompt"),
        (request("bad", (3,) * 96, max_tokens=1), "prompt"),
        (request("bad", (3,) * 50, max_tokens=47), "max_tokens"),
        (request("bad", (3,), max_tokens=0), "max_tokens"),
        (request("bad", (3,), temperature=-0.1), "temperature"),
        (request("bad", (3,), temperature=float("nan")), "temperature"),
        (request("bad", (3,), top_p=0.0), "top_p"),
        (request("bad", (3,), top_p=1.1), "top_p"),
        (request("bad", (3,), service_class=1), "service_class"),
        (request("good", (3,)), "request_id"),
    ],
)
def test_bad_request_is_rejected_at_the_door_and_nothing_is_queued(bad: Any, parameter: str) -> None:
    engine = tiny_engine()
    engine.submit(request("good", (3,)))
    with pytest.raises(Rejected) as refusal:
        engine.submit(bad)
    assert refusal.value.parameter == parameter
    assert engine.load().waiting == 1
    assert endings(run(engine)) == {"good": "length"}


def test_request_that_fills_the_context_exactly_is_served() -> None:
    engine = tiny_engine()
    engine.submit(request("a", (3,) * 50, max_tokens=46))
    assert len(tokens_of(run(engine), "a")) == 46


def test_cancelled_requests_end_in_the_next_step_and_free_their_slots_in_it() -> None:
    engine = tiny_engine(max_sequences=1)
    first, second, third = prompts([8, 9, 10])
    engine.submit(request("running", first, max_tokens=50))
    engine.submit(request("waiting", second))
    engine.submit(request("next", third, max_tokens=1))
    engine.step()
    for name in ("running", "waiting", "running", "unknown"):
        engine.cancel(name)
    report = engine.step()
    assert [e for e in report.events if isinstance(e, Finished)] == [
        Finished("running", FinishReason.CANCELLED),
        Finished("waiting", FinishReason.CANCELLED),
        Finished("next", FinishReason.LENGTH),
    ]
    assert engine.load().kv_blocks_used == 0
    assert not engine.has_work


def test_cancel_that_comes_too_late_does_not_hit_the_next_request_of_that_id() -> None:
    engine = tiny_engine()
    engine.submit(request("a", (3, 4), max_tokens=1))
    sabotage(engine, lambda stock, *args, **kwargs: (engine.cancel("a"), stock(*args, **kwargs))[1])
    assert endings(run(engine)) == {"a": "length"}
    del engine.model.model.base_model.forward
    engine.submit(request("a", (3, 4), max_tokens=2))
    assert endings(run(engine)) == {"a": "length"}


def test_forward_that_raises_for_one_prompt_fails_that_request_alone() -> None:
    engine, stock = tiny_engine(), tiny_model("qwen3_moe")
    sabotage(engine, raise_on_poison)
    good, other = clean_prompts([11, 7])
    engine.submit(request("running", good, max_tokens=6))
    events = list(engine.step().events)
    engine.submit(request("poison", (3, POISON, 4)))
    engine.submit(request("mate", other, max_tokens=6))
    events += run(engine)
    assert endings(events) == {"running": "length", "mate": "length", "poison": "failed"}
    for name, prompt in (("running", good), ("mate", other)):
        assert tokens_of(events, name) == stock_greedy(stock, prompt, 6)
    (failure,) = [e for e in events if isinstance(e, Finished) and e.request_id == "poison"]
    assert failure.error == "the model's forward raised RuntimeError"


def test_row_whose_logits_are_not_finite_fails_alone_and_leaves_its_slot_usable() -> None:
    engine, stock = tiny_engine(max_sequences=2), tiny_model("qwen3_moe")
    good, other = clean_prompts([30, 6])

    def poison_with_nan(stock_forward: Any, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = stock_forward(*args, input_ids=input_ids, **kwargs)
        poisoned = engine.scheduler.running["poison"].context
        assert poisoned
        for keys in engine.model.cache._keys.values():
            keys[poisoned.blocks] = torch.nan
        output.last_hidden_state[(input_ids == POISON).any(1)] = torch.nan
        return output

    engine.submit(request("mate", good, max_tokens=4))
    engine.submit(request("poison", (POISON,) * 9))
    sabotage(engine, poison_with_nan)
    events = list(engine.step().events)
    assert endings(events) == {"poison": "failed"}
    del engine.model.model.base_model.forward
    engine.submit(request("heir", other, max_tokens=4))
    events += run(engine)
    assert tokens_of(events, "mate") == stock_greedy(stock, good, 4)
    assert tokens_of(events, "heir") == stock_greedy(stock, other, 4)


def test_requests_may_be_submitted_and_cancelled_from_other_threads_while_steps_run() -> None:
    engine = tiny_engine()

    def client(prefix: str) -> None:
        for i in range(30):
            engine.submit(request(f"{prefix}{i}", (3, 4, 5), max_tokens=4))
            if i % 3 == 0:
                engine.cancel(f"{prefix}{i}")
            engine.load()

    threads = [threading.Thread(target=client, args=(prefix,)) for prefix in ("a", "b")]
    events = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.has_work:
        events += engine.step().events
    assert len(endings(events)) == 60
    assert set(endings(events).values()) <= {"length", "cancelled"}


def test_stop_token_is_the_last_token_and_ends_the_request_as_stop() -> None:
    engine, stock = tiny_engine(), tiny_model("qwen3_moe")
    (prompt,) = prompts([10])
    free = stock_greedy(stock, prompt, 12)
    stop = free[5]
    engine.submit(request("a", prompt, max_tokens=12, stop_token_ids=frozenset({stop})))
    events = run(engine)
    assert tokens_of(events, "a") == free[: free.index(stop) + 1]
    assert endings(events) == {"a": "stop"}


def test_prompts_longer_than_the_step_cap_are_read_in_chunks_beside_decoding_sequences() -> None:
    engine, stock = tiny_engine(prefill_tokens_per_step=8), tiny_model("qwen3_moe")
    short, long = prompts([4, 37])
    engine.submit(request("short", short, max_tokens=12))
    engine.step()
    engine.submit(request("long", long, max_tokens=5))
    events, shapes = [], []
    while engine.has_work:
        report = engine.step()
        events += report.events
        shapes.append((report.decode_sequences, report.prefill_tokens))
        if report.prefill_tokens:
            assert any(isinstance(e, Token) and e.request_id == "short" for e in report.events)
    assert [prefill for _, prefill in shapes][:6] == [8, 8, 8, 8, 5, 0]
    assert tokens_of(events, "long") == stock_greedy(stock, long, 5)


def test_report_prices_a_step_by_its_sequences_context_and_prompt_tokens() -> None:
    engine = tiny_engine()
    engine.submit(request("a", prompts([10])[0], max_tokens=5))
    engine.submit(request("b", prompts([6])[0], max_tokens=5))
    first, second = engine.step(), engine.step()
    assert (first.decode_sequences, first.context_tokens, first.prefill_tokens) == (0, 0, 16)
    assert (second.decode_sequences, second.context_tokens, second.prefill_tokens) == (2, 16, 0)
    assert not second.idle
    assert engine.load().kv_blocks_used == 2


def test_engine_that_sheds_refuses_who_would_come_too_late_and_takes_whom_it_can_serve_in_time() -> None:
    engine = tiny_engine(prefill_tokens_per_step=16, shed_above=2.0, clock=lambda: 0.0)
    cost = PointProfile(
        step_base_nanoseconds=10**9,
        step_per_sequence_nanoseconds=0,
        step_per_kilotoken_nanoseconds=0,
        prefill_base_nanoseconds=0,
        prefill_per_token_nanoseconds=0,
    )
    limits = {"max_sequences": 4, "kv_tokens": 384, "prefill_tokens_per_step": 16}
    engine.costs.take(
        Profile(accelerator="x", provenance="x", points=dict.fromkeys(engine.ladder.names, cost), **limits)
    )
    hurried = Promise(ttft_s=2.0)
    for name in ("a", "b", "c"):
        engine.submit(request(name, prompts([20], seed=ord(name))[0], max_tokens=2, promise=hurried))
    engine.step()
    with pytest.raises(Overloaded) as refused:
        engine.submit(request("late", (3,) * 40, max_tokens=2, promise=hurried))
    assert refused.value.retry_after_s > 2.0
    engine.submit(request("unhurried", (3,) * 40, max_tokens=2))
    engine.submit(request("urgent", (3,) * 4, max_tokens=2, priority=9, promise=hurried))
    assert set(endings(run(engine)).values()) == {"length"}
    engine.submit(request("late", (3,) * 80, max_tokens=2, promise=hurried))
    assert endings(run(engine)) == {"late": "length"}, "an idle engine takes everybody"
