"""Several choices of one prompt: `n` answers, each with its index, one usage, one fate."""

import asyncio
from collections import defaultdict
from typing import Any

import openai

from prism_runtime.engine.types import Request
from tests.runtime.models import request as engine_request
from tests.runtime.models import run, tiny_engine, tokens_of
from tests.runtime.serving.engine import MODEL, ScriptedEngine
from tests.runtime.serving.process import serving, until

SEEDED = {7: b"seven", 8: b"eight is longer", 9: b"9"}


def by_seed(request: Request) -> bytes:
    return SEEDED.get(request.sampling.seed or 0, b"x" * 500)


def test_whole_answer_holds_every_choice_in_order_and_the_prompt_is_counted_once() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(by_seed)) as served:
            status, answer = await served.complete(n=3, seed=7, max_tokens=40)
            assert status == 200
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            assert [choice["text"].encode() for choice in answer["choices"]] == list(SEEDED.values())
            tokens = sum(len(text) + 1 for text in SEEDED.values())
            assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
            assert served.process.accounting.totals["default"].met == 3, "each choice is a request to the accounting"

    asyncio.run(scenario())


def test_official_client_streams_the_choices_of_completions_and_chats() -> None:
    async def scenario() -> None:
        async with (
            serving(ScriptedEngine(by_seed)) as served,
            openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        ):
            texts: dict[int, str] = defaultdict(str)
            chat = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], n=3, seed=7, stream=True,
                stream_options={"include_usage": True}, max_completion_tokens=40,
            )  # fmt: skip
            roles: list[Any] = []
            async for chunk in chat:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    roles += [choice.index] if choice.delta.role else []
            assert [texts[i].encode() for i in range(3)] == list(SEEDED.values())
            assert roles == [0, 1, 2]
            assert chunk.usage is not None
            assert chunk.usage.completion_tokens == sum(len(text) + 1 for text in SEEDED.values())
            plain = await client.completions.create(model=MODEL, prompt="hi", n=2, seed=8, max_tokens=40)
            assert [choice.text for choice in plain.choices] == ["eight is longer", "9"]

    asyncio.run(scenario())


def test_client_gone_cancels_all_choices() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(by_seed, step_s=0.005)
        async with serving(engine) as served:
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 400, "stream": True, "n": 3}
            async with served.http.post(f"{served.url}/v1/completions", json=body) as response:
                await response.content.readline()
                response.close()
            await until(lambda: len(engine.cancelled) == 3, "the engine was told of each")
            await until(lambda: not engine.has_work, "all slots are free")
            assert served.process.accounting.totals["default"].cancelled == 3

    asyncio.run(scenario())


def test_failing_step_fails_the_whole_answer_and_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(by_seed)
        async with serving(engine) as served:
            await until(lambda: served.process.engine_loop.settled, "the first, empty step was run")
            engine.fail_steps = 1
            status, answer = await served.complete(n=3, max_tokens=400)
            assert (status, answer["error"]["type"]) == (500, "server_error")
            await until(lambda: not engine.has_work, "nothing is left in the engine")
            assert served.process.dispatcher.in_flight == 0

    asyncio.run(scenario())


def test_choices_of_one_prompt_are_computed_once_and_share_its_blocks() -> None:
    engine = tiny_engine(max_sequences=3)
    prompt = tuple(range(3, 43))
    for seed in range(3):
        engine.submit(engine_request(f"r{seed}", prompt, max_tokens=6, temperature=1.0, seed=seed))
    reports = [engine.step(), engine.step()]
    assert [report.prefill_tokens for report in reports] == [40, 2 * 8]
    assert engine.load().kv_blocks_used == 2 + 3, "two blocks of all, and one of each"
    events = [event for report in reports for event in report.events] + run(engine)
    assert len({tuple(tokens_of(events, f"r{seed}")) for seed in range(3)}) == 3
