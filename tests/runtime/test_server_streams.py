"""Streams: pieces, stop strings, usage, cancellation, failures in the middle, the official client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from prism_runtime.engine.types import FinishReason
from tests.runtime.serving.engine import MODEL, ScriptedEngine
from tests.runtime.serving.process import Served, serving, until


async def stream(served: Served, **body: Any) -> list[dict[str, Any] | str]:
    """All events of a streamed completion; the last is '[DONE]' if it ended well."""
    document = {"model": MODEL, "prompt": "hello", "max_tokens": 100, "stream": True} | body
    async with served.http.post(f"{served.url}/v1/completions", json=document) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream"
        raw = await response.text()
    assert raw.endswith("\n\n")
    events = [block.removeprefix("data: ") for block in raw.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if event != "[DONE]" and event["choices"])


@asynccontextmanager
async def client_of(engine: ScriptedEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(engine) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_stream_gives_one_piece_a_token_and_its_text_is_that_of_the_whole_answer() -> None:
    text = "héllo €😀 wörld"

    async def scenario() -> None:
        async with serving(ScriptedEngine(lambda request: text.encode())) as served:
            events = await stream(served)
            assert events[-1] == "[DONE]"
            assert text_of(events) == text
            assert len(events) - 1 == len(text.encode()) + 1  # a piece a byte, one for the end token
            assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * len(text.encode()) + ["stop"]
            assert "\ufffd" not in "".join(e["choices"][0]["text"] for e in events[:-1])
            _, whole = await served.complete(max_tokens=100)
            assert whole["choices"][0]["text"] == text

    asyncio.run(scenario())


def test_usage_comes_last_and_only_if_asked_for() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(lambda request: b"abc")) as served:
            asked = await stream(served, stream_options={"include_usage": True})
            assert asked[-2]["choices"] == []
            assert asked[-2]["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
            assert all("usage" not in event for event in (await stream(served))[:-1])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("€", "price 5"),
        (["zzz", "5€"], "price "),
        ("€ and", "price 5"),
        ("nowhere", "price 5€ and more"),
        (["and mor", "e 5"], "pric"),
    ],
)
def test_answer_ends_before_the_first_stop_string_wherever_token_borders_fall(stop: Any, text: str) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: "price 5€ and more".encode())
        async with serving(engine) as served:
            events = await stream(served, stop=stop)
            assert text_of(events) == text
            assert events[-2]["choices"][0]["finish_reason"] == "stop"
            _, whole = await served.complete(stop=stop, max_tokens=100)
            assert whole["choices"][0]["text"] == text
            await until(lambda: not engine.has_work, "the engine freed the stopped requests")
            metrics = await served.metrics()
            assert metrics['prism_runtime_requests_total{class="default",outcome="met"}'] == 2
            assert metrics['prism_runtime_requests_total{class="default",outcome="cancelled"}'] == 0

    asyncio.run(scenario())


def test_client_gone_in_mid_stream_cancels_its_request_and_is_counted_once() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 500, step_s=0.005)
        async with serving(engine) as served:
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 400, "stream": True}
            async with served.http.post(f"{served.url}/v1/completions", json=body) as response:
                await response.content.readline()
                response.close()
            await until(lambda: engine.cancelled, "the engine was told")
            await until(lambda: not engine.has_work, "the slot is free")
            counters = served.process.accounting.totals["default"]
            assert (counters.cancelled, counters.met, counters.missed) == (1, 0, 0)

    asyncio.run(scenario())


def test_client_gone_before_the_first_token_of_a_plain_request_cancels_it() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            engine.gate.clear()
            request = asyncio.create_task(served.complete())
            await until(lambda: engine.requests, "the request is in")
            request.cancel()
            await until(lambda: engine.cancelled, "the engine was told")
            engine.gate.set()
            await until(lambda: not engine.has_work, "the slot is free")
            assert served.process.accounting.totals["default"].cancelled == 1

    asyncio.run(scenario())


def test_failing_step_ends_every_stream_with_an_error_event_in_place_of_done() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 500, step_s=0.002)
        async with serving(engine) as served:
            streams = [asyncio.create_task(stream(served, max_tokens=400)) for _ in range(3)]
            await until(lambda: len(engine.steps) > 20, "streams are under way")
            engine.fail_steps = 1
            for events in await asyncio.gather(*streams):
                assert events[-1]["error"]["code"] == "engine_error"
                assert len(events) > 1
            assert served.process.accounting.totals["default"].missed == 3
            assert len(engine.cancelled) == 3  # else the engine would go on for clients that were told it failed
            assert (await served.complete())[0] == 200

    asyncio.run(scenario())


def test_every_request_gets_exactly_one_outcome() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 300, max_sequences=8)
        async with serving(engine) as served:
            requests = [asyncio.create_task(served.complete(max_tokens=20 + i)) for i in range(40)]
            await until(lambda: len(engine.steps) > 10, "requests run")
            for request in requests[::4]:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            await until(lambda: served.process.dispatcher.in_flight == 0, "all ended")
            counters = served.process.accounting.totals["default"]
            assert counters.arrived == 40
            assert counters.met + counters.missed + counters.cancelled == 40
            assert counters.met >= 30

    asyncio.run(scenario())


def test_official_client_streams_completions_and_chats() -> None:
    async def scenario() -> None:
        async with client_of(ScriptedEngine(lambda request: b"hello there")) as client:
            chat = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
                max_completion_tokens=50,
            )
            chunks = [chunk async for chunk in chat]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == "hello there"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 12
            plain = await client.completions.create(model=MODEL, prompt="hi", max_tokens=5)
            assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("hello", FinishReason.LENGTH)
            with pytest.raises(openai.BadRequestError, match="must fit"):
                await client.completions.create(model=MODEL, prompt="x" * 600)
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")

    asyncio.run(scenario())


def test_official_client_raises_on_an_error_event() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 500, step_s=0.002)
        async with client_of(engine) as client:
            answer = await client.completions.create(model=MODEL, prompt="hi", max_tokens=400, stream=True)
            await anext(answer)
            engine.fail_steps = 1
            with pytest.raises(openai.APIError, match="engine failed"):
                _ = [chunk async for chunk in answer]

    asyncio.run(scenario())


def test_log_probabilities_come_with_every_token_of_whole_and_streamed_answers() -> None:
    async def scenario() -> None:
        async with client_of(ScriptedEngine(lambda request: b"ab")) as client:
            ask = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
            whole = (await client.completions.create(**ask, logprobs=1)).choices[0].logprobs
            assert whole is not None
            assert (whole.tokens, whole.token_logprobs, whole.text_offset) == (["a", "b"], [-0.5, -0.5], [0, 1])
            assert whole.top_logprobs == [{"a": -0.5}, {"b": -0.5}]
            pieces = [piece async for piece in await client.completions.create(**ask, logprobs=1, stream=True)]
            tokens = [piece.choices[0].logprobs.tokens for piece in pieces if piece.choices[0].logprobs]
            assert tokens == [["a"], ["b"]]
            assert (await client.completions.create(**ask)).choices[0].logprobs is None

            talk: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            chat = (await client.chat.completions.create(**talk, logprobs=True, top_logprobs=2)).choices[0].logprobs
            assert chat is not None
            [content] = chat.content
            assert (content.token, content.bytes, content.logprob) == ("a", [97], -0.5)
            assert [(each.token, each.logprob) for each in content.top_logprobs] == [("a", -0.5), ("z", -1.5)]
            with pytest.raises(openai.BadRequestError, match="top_logprobs"):
                await client.chat.completions.create(**talk, top_logprobs=2)

    asyncio.run(scenario())
