"""The load generator against small servers, each with one habit."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

from examples.demo.prompts import prompt
from examples.demo.records import Answer, read_answers
from examples.demo.replay import Client, ReplayError, replay
from examples.demo.trace import Arrival

TOKENS = list(range(1000))
Habit = Callable[[web.Request, dict], Awaitable[web.StreamResponse]]


def event(document: object) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


async def stream(request: web.Request, body: dict, gap_s: float = 0.0, *, done: bool = True) -> web.StreamResponse:
    """As the runtime streams: one chunk a token, usage, [DONE]."""
    response = web.StreamResponse(headers={"x-prism-operating-point": "b750"})
    await response.prepare(request)
    for _ in range(body["max_tokens"]):
        await response.write(event({"choices": [{"text": "x"}]}))
        await asyncio.sleep(gap_s)
    await response.write(event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}))
    if done:
        await response.write(event(b"[DONE]"))
    await response.write_eof()
    return response


@asynccontextmanager
async def server(habit: Habit) -> AsyncIterator[tuple[str, list[dict]]]:
    """URL of a server that behaves on the warm-up and by `habit` afterwards, and the bodies it got."""
    bodies: list[dict] = []

    async def completions(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await (stream if len(bodies) == 1 else habit)(request, bodies[-1])

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "small-moe"}]})

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


def play(habit: Habit, arrivals: list[Arrival], out: Path, **options: float) -> tuple[list[Answer], list[dict]]:
    async def run() -> tuple[list[Answer], list[dict]]:
        async with server(habit) as (url, bodies):
            return await replay(url, arrivals, TOKENS, out, **options), bodies

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_an_answer_carries_point_tokens_and_latencies(tmp_path: Path) -> None:
    async def slowly(request: web.Request, body: dict) -> web.StreamResponse:
        return await stream(request, body, gap_s=0.02)

    (answer,), bodies = play(slowly, [Arrival(0.0, 7, 5)], tmp_path / "out.jsonl")
    assert (answer.outcome, answer.status, answer.point, answer.output_tokens) == ("finished", 200, "b750", 5)
    assert answer.tpot_s is not None
    assert answer.ttft_s is not None
    assert 0.02 <= answer.tpot_s < 0.2
    assert answer.ttft_s < answer.end_s
    sent = bodies[1]
    assert (len(sent["prompt"]), sent["max_tokens"], sent["ignore_eos"], sent["stream"]) == (7, 5, True, True)


def test_a_slow_answer_does_not_delay_the_next_request(tmp_path: Path) -> None:
    """Open loop: with a closed one the third request would be sent after the first two had ended."""
    arrivals = [Arrival(at_s, 3, 1) for at_s in (0.0, 0.05, 0.1)]
    together = asyncio.Event()
    seen = 0

    async def all_at_once(request: web.Request, body: dict) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        if seen == len(arrivals):
            together.set()
        await together.wait()
        return await stream(request, body)

    answers, _ = play(all_at_once, arrivals, tmp_path / "out.jsonl")
    assert [answer.outcome for answer in answers] == ["finished"] * 3


def test_latency_counts_from_the_traces_time_though_the_client_was_late() -> None:
    async def send_late() -> Answer:
        async with server(stream) as (url, _), ClientSession() as session:
            began_s = time.monotonic() - 3.0
            client = Client(session, url, "small-moe", TOKENS, lambda: time.monotonic() - began_s, 10)
            return await client.send(0, Arrival(1.0, 3, 1))

    answer = asyncio.run(asyncio.wait_for(send_late(), 30))
    assert answer.sent_s >= 3.0
    assert answer.ttft_s is not None
    assert answer.ttft_s >= 2.0


def test_a_shed_request_is_told_apart_and_not_tried_again(tmp_path: Path) -> None:
    async def shed(_: web.Request, body: dict) -> web.StreamResponse:
        return web.json_response({"error": {"message": "shed"}}, status=429)

    answers, bodies = play(shed, [Arrival(0.0, 3, 1)], tmp_path / "out.jsonl")
    assert (answers[0].outcome, answers[0].status, answers[0].retries) == ("shed", 429, 0)
    assert len(bodies) == 2


def test_a_connection_reset_before_any_byte_is_tried_again_and_counted(tmp_path: Path) -> None:
    attempts = 0

    async def reset_twice(request: web.Request, body: dict) -> web.StreamResponse:
        nonlocal attempts
        attempts += 1
        if attempts <= 2:
            assert request.transport is not None
            request.transport.abort()
        return await stream(request, body)

    answers, _ = play(reset_twice, [Arrival(0.0, 3, 2)], tmp_path / "out.jsonl")
    assert (answers[0].outcome, answers[0].retries) == ("finished", 2)


def test_a_stream_that_breaks_off_is_a_failure_and_not_tried_again(tmp_path: Path) -> None:
    async def break_off(request: web.Request, body: dict) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event({"choices": [{"text": "x"}]}))
        assert request.transport is not None
        request.transport.abort()
        return response

    answers, bodies = play(break_off, [Arrival(0.0, 3, 4)], tmp_path / "out.jsonl")
    assert (answers[0].outcome, answers[0].status, answers[0].retries) == ("failed", 200, 0)
    assert len(bodies) == 2


@pytest.mark.parametrize("last", [{"error": {"message": "the engine failed"}}, None], ids=["error event", "no DONE"])
def test_a_stream_without_a_proper_end_is_a_failure(tmp_path: Path, last: dict | None) -> None:
    async def spoil(request: web.Request, body: dict) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event({"choices": [{"text": "x"}]}))
        if last:
            await response.write(event(last))
        await response.write_eof()
        return response

    answers, _ = play(spoil, [Arrival(0.0, 3, 4)], tmp_path / "out.jsonl")
    assert answers[0].outcome == "failed"
    assert answers[0].error


def test_a_request_without_an_answer_fails_at_its_timeout(tmp_path: Path) -> None:
    async def never(request: web.Request, body: dict) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    answers, _ = play(never, [Arrival(0.0, 3, 1)], tmp_path / "out.jsonl", request_timeout_s=0.3)
    assert answers[0].outcome == "failed"
    assert "0.3 s" in (answers[0].error or "")


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answers, _ = play(stream, [Arrival(at_s / 50, 3, 2) for at_s in range(5)], out)
    assert sorted(read_answers(out), key=lambda answer: answer.index) == answers


def test_a_half_written_line_is_left_for_the_next_look(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    play(stream, [Arrival(0.0, 3, 2), Arrival(0.01, 3, 2)], out)
    out.write_text(out.read_text()[:-20])
    assert len(read_answers(out)) == 1


def test_a_server_that_is_not_there_stops_the_replay_before_it_begins(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ReplayError, match="told no model"):
        asyncio.run(replay(f"http://127.0.0.1:{port}", [Arrival(0, 1, 1)], TOKENS, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_have_the_length_asked_for_and_differ() -> None:
    first, second = prompt(TOKENS, 1, 320), prompt(TOKENS, 2, 320)
    assert len(first) == len(second) == 320
    assert first != second
    assert prompt(TOKENS, 1, 320) == first
