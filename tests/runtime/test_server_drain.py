"""SIGTERM: leave the endpoints, finish what was accepted, tell what could not be finished, exit 0."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.runtime.serving.engine import MODEL, ScriptedEngine
from tests.runtime.serving.process import serving, until


@dataclass
class Subprocess:
    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession

    async def stream(self, max_tokens: int, started: asyncio.Event | None = None) -> list[str]:
        """Raw events of a stream; sets `started` after the first."""
        body = {"model": MODEL, "prompt": "hello", "max_tokens": max_tokens, "stream": True}
        events = []
        async with self.http.post(f"{self.url}/v1/completions", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: "):
                    events.append(line.decode().removeprefix("data: ").strip())
                    if started:
                        started.set()
        return events

    async def status(self, path: str) -> int:
        async with self.http.get(self.url + path) as response:
            return response.status


@asynccontextmanager
async def subprocess(*flags: str) -> AsyncIterator[Subprocess]:
    command = [sys.executable, "-m", "tests.runtime.serving.scripted_server", "--port", "0", "--metrics-port", "0"]
    process = await asyncio.create_subprocess_exec(*command, *flags, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        ports = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as http:
            yield Subprocess(process, f"http://127.0.0.1:{ports['port']}", http)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def start(server: Subprocess, count: int, max_tokens: int) -> list[asyncio.Task[list[str]]]:
    """Streams of which each has given its first token."""
    begun = [asyncio.Event() for _ in range(count)]
    streams = [asyncio.create_task(server.stream(max_tokens, event)) for event in begun]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 30)
    return streams


def test_sigterm_during_streams_loses_nothing_and_exits_0() -> None:
    async def scenario() -> None:
        async with subprocess("--drain-grace", "0.3", "--drain-seconds", "30") as server:
            streams = await start(server, 20, max_tokens=250)
            server.process.send_signal(signal.SIGTERM)
            late = [asyncio.create_task(server.stream(20)) for _ in range(5)]  # endpoints still name this pod
            for events in await asyncio.gather(*streams):
                assert events[-1] == "[DONE]"
                assert len(events) == 251
            for events in await asyncio.gather(*late):
                assert events[-1] == "[DONE]"
            assert await asyncio.wait_for(server.process.wait(), 10) == 0

    asyncio.run(scenario())


def test_pod_that_leaves_is_not_ready_but_alive_and_accepts_until_its_doors_close() -> None:
    async def scenario() -> None:
        async with subprocess("--drain-grace", "1", "--drain-seconds", "30") as server:
            (stream,) = await start(server, 1, max_tokens=400)
            assert await server.status("/ready") == 200
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                while await server.status("/ready") == 200:
                    pass
            assert await server.status("/health") == 200
            assert (await server.stream(5))[-1] == "[DONE]"
            async with asyncio.timeout(10):
                while True:
                    try:
                        await server.status("/ready")
                    except aiohttp.ClientConnectionError:
                        break
                    await asyncio.sleep(0.01)
            assert (await stream)[-1] == "[DONE]"
            assert await asyncio.wait_for(server.process.wait(), 10) == 0

    asyncio.run(scenario())


def test_stream_unfinished_after_the_drain_time_ends_with_an_error_event_and_exit_is_0() -> None:
    async def scenario() -> None:
        async with subprocess("--drain-grace", "0", "--drain-seconds", "0.2") as server:
            streams = await start(server, 3, max_tokens=4000)
            server.process.send_signal(signal.SIGTERM)
            for events in await asyncio.gather(*streams):
                assert "shutting down" in json.loads(events[-1])["error"]["message"]
            assert await asyncio.wait_for(server.process.wait(), 10) == 0

    asyncio.run(scenario())


def test_second_interrupt_does_not_wait_for_answers() -> None:
    async def scenario() -> None:
        async with subprocess("--drain-seconds", "60") as server:
            (stream,) = await start(server, 1, max_tokens=4000)
            server.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(5):
                while not stream.done():
                    server.process.send_signal(signal.SIGINT)
                    await asyncio.sleep(0.05)
            assert "interrupted" in json.loads((await stream)[-1])["error"]["message"]
            assert await asyncio.wait_for(server.process.wait(), 10) == 0

    asyncio.run(scenario())


def test_idle_keep_alive_connection_is_closed_with_the_doors_so_that_its_client_may_retry() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 400, step_s=0.005)
        async with serving(engine, drain_grace=0.0, drain_seconds=20.0) as served:
            await served.complete()
            reader, writer = await asyncio.open_connection("127.0.0.1", served.ports["port"])
            writer.write(b"GET /ready HTTP/1.1\r\nHost: pod\r\n\r\n")
            assert b"200" in await reader.readline()
            running = asyncio.create_task(served.complete(max_tokens=300))
            await until(lambda: engine.has_work, "a request runs")
            served.process.stop()
            await asyncio.wait_for(reader.read(), 5)  # to its end: the server closed it
            assert not running.done()
            assert (await running)[0] == 200
            writer.close()

    asyncio.run(scenario())


def test_starting_pod_is_alive_but_not_ready_and_refuses_requests_with_503() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(), pace_start_seconds=60.0) as served:
            for path, status in (("/health", 200), ("/ready", 503)):
                async with served.http.get(served.url + path) as response:
                    assert response.status == status
            body: dict[str, Any] = {"model": MODEL, "prompt": "x"}
            async with served.http.post(f"{served.url}/v1/completions", json=body) as response:
                assert response.status == 503
                assert "Retry-After" in response.headers
            assert not served.process.reporter.report().ready

    asyncio.run(scenario())


def test_health_turns_false_when_steps_hang_and_stays_true_under_load() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 400, max_sequences=1)
        async with serving(engine, watchdog_seconds=0.3) as served:
            requests = [asyncio.create_task(served.complete(max_tokens=40)) for _ in range(20)]
            await until(lambda: engine.load().waiting > 10, "a queue")
            assert served.process.engine_loop.alive
            engine.gate.clear()
            await until(lambda: not served.process.engine_loop.alive, "the watchdog saw the hanging step")
            async with served.http.get(served.url + "/health") as response:
                assert response.status == 503
            engine.gate.set()
            assert {status for status, _ in await asyncio.gather(*requests)} == {200}
            assert served.process.engine_loop.alive

    asyncio.run(scenario())


def test_health_turns_false_when_every_step_raises() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            engine.fail_steps = 10**6
            for _ in range(3):
                assert (await served.complete())[0] == 500
            assert not served.process.engine_loop.alive
            engine.fail_steps = 0
            assert (await served.complete())[0] == 200
            assert served.process.engine_loop.alive

    asyncio.run(scenario())
