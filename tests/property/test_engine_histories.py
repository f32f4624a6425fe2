"""Whatever arrives, leaves and switches: one ending a request, and full budget is the stock model's text.

On every architecture, with memory for fewer contexts than may run: prompts are read in chunks and found in other
requests' blocks, requests are cancelled, stopped for want of memory, and go on.
"""

from collections.abc import Sequence
from functools import cache
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.types import Event, Finished, Plan, Promise, Token
from tests.runtime.models import ARCHITECTURES, COUNTS, prompts, request, run, stock_greedy, tiny_engine, tiny_model

GOLD, BULK = 0, 1
FULL = len(COUNTS) - 1
MAX_TOKENS = 24
LONG, OTHER = prompts([50, 33])
PROMPTS = [LONG[:1], LONG[:17], LONG[:33], LONG, OTHER, LONG[:16] + OTHER[:20]]
"""Most begin alike, some for one block and some for two."""

submit = st.tuples(
    st.just("submit"), st.integers(0, 5), st.integers(1, MAX_TOKENS), st.sampled_from([GOLD, BULK]), st.integers(0, 1)
)
cancel = st.tuples(st.just("cancel"), st.integers(0, 20))
switch = st.tuples(st.just("switch"), st.integers(0, FULL))
step = st.tuples(st.just("step"))
history = st.lists(st.one_of(submit, submit, cancel, switch, step, step, step), max_size=40)

names, ticks = count(), count()


@cache
def engine(architecture: str) -> Engine:
    """Shared by all examples, as a pod's engine is by all its requests: each must leave it empty."""
    one = tiny_engine(
        architecture,
        max_sequences=4,
        prefill_tokens_per_step=12,
        kv_tokens=16 * 9,
        classes=2,
        clock=lambda: float(next(ticks)),
    )
    cost = PointProfile(
        step_base_nanoseconds=10**9,
        step_per_sequence_nanoseconds=0,
        step_per_kilotoken_nanoseconds=0,
        prefill_base_nanoseconds=0,
        prefill_per_token_nanoseconds=10**7,
    )
    points = dict.fromkeys(one.ladder.names, cost)
    limits = {"max_sequences": 4, "kv_tokens": 144, "prefill_tokens_per_step": 12}
    one.costs.take(Profile(accelerator="x", provenance="x", points=points, **limits))
    return one


@cache
def stock_text(architecture: str, prompt: int) -> list[int]:
    return stock_greedy(tiny_model(architecture), PROMPTS[prompt], MAX_TOKENS)


def play(architecture: str, moves: Sequence[tuple]) -> None:
    """Bulk requests have objectives that cannot be kept, so that the policy lowers them below their class's point."""
    pod, submitted, events = engine(architecture), dict[str, tuple[int, int, int]](), list[Event]()
    for move, *arguments in moves:
        if move == "submit":
            prompt, max_tokens, service_class, priority = arguments
            name = f"r{next(names)}"
            submitted[name] = (prompt, max_tokens, service_class)
            promise = Promise() if service_class == GOLD else Promise(0.1, 0.1, floor=0)
            own = {"service_class": service_class, "priority": priority, "promise": promise}
            pod.submit(request(name, PROMPTS[prompt], max_tokens, **own))
        elif move == "cancel" and arguments[0] < len(submitted):
            pod.cancel(list(submitted)[arguments[0]])
        elif move == "switch":
            pod.set_plan(Plan(pod.plan.version + 1, (FULL, arguments[0])))
        elif move == "step":
            events += pod.step().events
    events += run(pod, max_steps=5000)

    assert pod.load().kv_blocks_used == 0
    assert pod.scheduler.pool.available == pod.scheduler.pool.blocks
    for name, (prompt, max_tokens, service_class) in submitted.items():
        own_events = [event for event in events if event.request_id == name]
        assert [isinstance(event, Finished) for event in own_events] == [False] * (len(own_events) - 1) + [True]
        tokens = [event for event in own_events if isinstance(event, Token)]
        assert len(tokens) == max_tokens or own_events[-1].reason == "cancelled"
        if service_class == GOLD:
            assert [token.token_id for token in tokens] == stock_text(architecture, prompt)[: len(tokens)]
            assert {token.point for token in tokens} <= {FULL}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_request_ends_once_and_gold_at_full_is_the_stock_text_through_any_history(architecture: str) -> None:
    @settings(max_examples=4, deadline=None, derandomize=False)
    @given(history)
    def through(moves: list[tuple]) -> None:
        play(architecture, moves)

    through()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gold_is_the_stock_text_where_prompts_are_chunked_found_cancelled_and_stopped(architecture: str) -> None:
    """One history in which all of it happens for certain; the random ones have it by chance."""
    before = engine(architecture).load()
    busy = [("submit", i % 6, MAX_TOKENS, (GOLD, GOLD, BULK)[i % 3], i % 2) for i in range(12)]
    moves = [move for one in busy for move in (one, ("step",), ("step",))]
    play(architecture, [*moves, ("cancel", 7), ("step",), ("switch", 1), ("cancel", 11)])
    after = engine(architecture).load()
    assert after.preemptions > before.preemptions
    assert after.prompt_tokens_known > before.prompt_tokens_known
    engine(architecture).submit(request(f"r{next(names)}", OTHER, 2, service_class=BULK, promise=Promise(0.1, 0.1, 0)))
    points = {event.point for event in run(engine(architecture)) if isinstance(event, Token)}
    assert 0 in points, "bulk is lowered by the policy itself"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_gold_computes_a_prompt_again_that_bulk_has_read_at_a_smaller_budget_and_bulk_takes_golds(
    architecture: str,
) -> None:
    pod = tiny_engine(architecture, classes=2)
    pod.set_plan(Plan(1, (FULL, 0)))
    known = []
    for name, service_class in (("bulk", BULK), ("gold", GOLD), ("bulk again", BULK)):
        pod.submit(request(name, LONG, MAX_TOKENS, service_class=service_class))
        events = run(pod)
        known.append(pod.load().prompt_tokens_known)
        if service_class == GOLD:
            tokens = [event.token_id for event in events if isinstance(event, Token)]
            assert tokens == stock_greedy(tiny_model(architecture), LONG, MAX_TOKENS)
    assert known == [0, 0, 48]
