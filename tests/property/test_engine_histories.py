"""Whatever arrives, leaves and switches: one ending a request, and full budget is the stock model's text."""

from functools import cache
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime.engine.engine import Engine
from prism_runtime.engine.types import Event, Finished, Plan, Token
from tests.runtime.models import COUNTS, prompts, request, run, stock_greedy, tiny_engine, tiny_model

GOLD, BRONZE = 0, 1
FULL = len(COUNTS) - 1
MAX_TOKENS = 8
PROMPTS = prompts([1, 4, 9, 17, 18, 33])

submit = st.tuples(st.just("submit"), st.integers(0, 5), st.integers(1, MAX_TOKENS), st.sampled_from([GOLD, BRONZE]))
cancel = st.tuples(st.just("cancel"), st.integers(0, 20))
switch = st.tuples(st.just("switch"), st.integers(0, FULL))
step = st.tuples(st.just("step"))
history = st.lists(st.one_of(submit, submit, cancel, switch, step, step), max_size=30)

names = count()


@cache
def engine() -> Engine:
    """Shared by all examples, as a pod's engine is by all its requests: each must leave it empty."""
    return tiny_engine(max_sequences=3, prefill_tokens_per_step=12, kv_tokens=16 * 7, classes=2)


@cache
def stock_text(prompt: int) -> list[int]:
    return stock_greedy(tiny_model("qwen3_moe"), PROMPTS[prompt], MAX_TOKENS)


@settings(max_examples=60, deadline=None)
@given(history)
def test_every_request_ends_once_and_gold_at_full_is_the_stock_text_through_any_history(moves: list[tuple]) -> None:
    submitted: dict[str, tuple[int, int, int]] = {}
    events: list[Event] = []
    for move, *arguments in moves:
        if move == "submit":
            prompt, max_tokens, service_class = arguments
            name = f"r{next(names)}"
            submitted[name] = (prompt, max_tokens, service_class)
            engine().submit(request(name, PROMPTS[prompt], max_tokens, service_class=service_class))
        elif move == "cancel" and arguments[0] < len(submitted):
            engine().cancel(list(submitted)[arguments[0]])
        elif move == "switch":
            engine().set_plan(Plan(engine().plan.version + 1, (FULL, arguments[0])))
        elif move == "step":
            events += engine().step().events
    events += run(engine())

    assert engine().load().kv_blocks_used == 0
    for name, (prompt, max_tokens, service_class) in submitted.items():
        own = [event for event in events if event.request_id == name]
        assert [isinstance(event, Finished) for event in own] == [False] * (len(own) - 1) + [True]
        tokens = [event for event in own if isinstance(event, Token)]
        assert len(tokens) == max_tokens or own[-1].reason == "cancelled"
        if service_class == GOLD:
            assert [token.token_id for token in tokens] == stock_text(prompt)[: len(tokens)]
            assert {token.point for token in tokens} <= {FULL}
