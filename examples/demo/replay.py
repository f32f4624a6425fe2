"""Open-loop load: sends each request of a trace at its time, whether or not earlier ones are answered.

    python -m examples.demo.replay --url http://10.96.3.7:8000 --trace FILE.csv --out ANSWERS.jsonl

A process of its own, so that it can run in the network namespace of a node, where a Service's address leads somewhere.
Every request opens a connection, because kube-proxy chooses a pod per connection.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from examples.demo import prompts, trace
from examples.demo.records import Answer, as_line
from examples.demo.trace import Arrival

RETRIES, RETRY_AFTER_S = 20, 0.1
WARM_UP_TOKENS = 4
SHED = 429
UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)
"""What a connection refused or reset before any byte raises; after the first byte such an error is a failure."""


class ReplayError(RuntimeError):
    """The replay cannot begin; the message says what the server answered."""


@dataclass(slots=True)
class _Stream:
    """What is known of one answer while it streams."""

    sent_s: float = 0.0
    status: int = 0
    point: str | None = None
    first_s: float | None = None
    last_s: float | None = None
    output_tokens: int = 0
    retries: int = 0


class Client:
    """Sends completions to one server. `clock` counts seconds since the replay began."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        tokens: Sequence[int],
        clock: Callable[[], float],
        request_timeout_s: float,
    ) -> None:
        self._session, self._url, self._model = session, url.rstrip("/"), model
        self._tokens, self._clock, self._request_timeout_s = tokens, clock, request_timeout_s

    async def send(self, index: int, arrival: Arrival, headers: Mapping[str, str] | None = None) -> Answer:
        """One request at its time. Never raises for what a server or network does: that is in the answer."""
        await asyncio.sleep(max(0.0, arrival.at_s - self._clock()))
        stream, error = _Stream(sent_s=self._clock()), None
        try:
            async with asyncio.timeout(self._request_timeout_s):
                await self._complete(index, arrival, stream, headers)
        except TimeoutError:
            error = f"no complete answer within {self._request_timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        if error is None and stream.status != 200:
            error = f"HTTP {stream.status}"
        return _answer(index, arrival, stream, error, self._clock())

    async def _complete(self, index: int, arrival: Arrival, stream: _Stream, headers: Mapping[str, str] | None) -> None:
        body = {
            "model": self._model,
            "prompt": prompts.prompt(self._tokens, index, arrival.prompt_tokens),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with await self._post(body, stream, headers) as response:
            stream.status = response.status
            stream.point = response.headers.get("x-prism-operating-point")
            if response.status == 200:
                await self._read(response, stream)

    async def _post(
        self, body: dict[str, Any], stream: _Stream, headers: Mapping[str, str] | None
    ) -> aiohttp.ClientResponse:
        while True:
            try:
                return await self._session.post(f"{self._url}/v1/completions", json=body, headers=headers)
            except UNREACHED:
                if stream.retries == RETRIES:
                    raise
                stream.retries += 1
                await asyncio.sleep(RETRY_AFTER_S)

    async def _read(self, response: aiohttp.ClientResponse, stream: _Stream) -> None:
        """Server-sent events until `[DONE]`. Raises ValueError for an error event and for a stream that just ends."""
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"error in the stream: {event['error'].get('message')}")
            if event["choices"]:
                stream.last_s = self._clock()
                if stream.first_s is None:
                    stream.first_s = stream.last_s
            if event.get("usage"):
                stream.output_tokens = event["usage"]["completion_tokens"]
        raise ValueError("the stream ended without [DONE]")


def _answer(index: int, arrival: Arrival, stream: _Stream, error: str | None, now_s: float) -> Answer:
    ttft_s = tpot_s = None
    if stream.first_s is not None and stream.last_s is not None:
        ttft_s = stream.first_s - arrival.at_s
        if stream.output_tokens > 1:
            tpot_s = (stream.last_s - stream.first_s) / (stream.output_tokens - 1)
    return Answer(
        index=index,
        at_s=arrival.at_s,
        sent_s=round(stream.sent_s, 4),
        outcome="finished" if error is None else "shed" if stream.status == SHED else "failed",
        status=stream.status,
        end_s=round(now_s, 4),
        ttft_s=None if ttft_s is None else round(ttft_s, 4),
        tpot_s=None if tpot_s is None else round(tpot_s, 4),
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=stream.output_tokens,
        point=stream.point,
        retries=stream.retries,
        error=error,
    )


async def replay(
    url: str,
    arrivals: Sequence[Arrival],
    tokens: Sequence[int],
    out: Path,
    *,
    request_timeout_s: float = 90,
    on_begin: Callable[[float], None] = lambda began_s: None,
) -> list[Answer]:
    """Warm up, then replay. Answers are appended to `out` as they end; `on_begin` gets the CLOCK_MONOTONIC of second 0.

    Raises ReplayError if the server does not answer the warm-up; nothing is written then.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        model = await _served_model(session, url)
        warm_up = Client(session, url, model, tokens, lambda: 0.0, request_timeout_s)
        first = await warm_up.send(0, Arrival(0.0, WARM_UP_TOKENS, WARM_UP_TOKENS))
        if first.outcome != "finished":
            raise ReplayError(f"the warm-up request to {url} failed ({first.error}); is the service Ready?")
        began_s = time.monotonic()
        on_begin(began_s)
        client = Client(session, url, model, tokens, lambda: time.monotonic() - began_s, request_timeout_s)
        answers = []
        with out.open("w", buffering=1) as file:
            sends = [client.send(index, arrival) for index, arrival in enumerate(arrivals)]
            for ended in asyncio.as_completed(sends):
                answers.append(await ended)
                file.write(as_line(answers[-1]))
    return sorted(answers, key=lambda answer: answer.index)


async def _served_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(f"{url.rstrip('/')}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError, KeyError, IndexError) as error:
        raise ReplayError(f"GET {url}/v1/models told no model: {type(error).__name__}: {error}") from error


BEGAN = "began at "


def tell_begin(began_s: float) -> None:
    """The line by which a parent process ties the answers' clock to its own."""
    print(f"{BEGAN}{began_s:.4f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.replay", description="Replay a trace over HTTP.")
    parser.add_argument(
        "--url", required=True, help="of an OpenAI-compatible server, for example http://10.96.3.7:8000"
    )
    parser.add_argument("--trace", type=Path, default=trace.SHIPPED, help="CSV (default: the demo's burst)")
    parser.add_argument("--out", type=Path, required=True, help="answers, one JSON line each")
    parser.add_argument(
        "--request-timeout", type=float, default=90, help="seconds until a request has failed (default 90)"
    )
    arguments = parser.parse_args()
    try:
        arrivals = trace.load(arguments.trace)
        tokens = prompts.held_out_tokens()
        work = replay(
            arguments.url,
            arrivals,
            tokens,
            arguments.out,
            request_timeout_s=arguments.request_timeout,
            on_begin=tell_begin,
        )
        answers = asyncio.run(work)
    except (ReplayError, trace.TraceError, prompts.PromptError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(answers)} requests, {sum(answer.outcome != 'finished' for answer in answers)} not finished")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
