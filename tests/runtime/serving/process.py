"""A serving process inside a test: real sockets on 127.0.0.1, started and drained around the body."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from prism_api.profile import Profile
from prism_runtime.engine.pace import Pacer
from prism_runtime.server.app import ServingProcess
from prism_runtime.server.settings import ServeSettings, add_serve_flags
from tests.runtime.serving.engine import END, MODEL

DIGEST = "sha256:" + "a" * 64
SERVICE_UID = "uid-1"


def default_settings(**changes: Any) -> ServeSettings:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, Path("unused"))
    arguments = ["artifact", "--port", "0", "--metrics-port", "0", "--control-port", "0", "--drain-grace", "0"]
    settings = ServeSettings.of(parser.parse_args(arguments))
    return replace(settings, **{"drain_seconds": 5.0, **changes})


@dataclass
class Served:
    process: ServingProcess
    ports: dict[str, int]
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['port']}"

    async def complete(self, *, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, dict[str, Any]]:
        document = {"model": MODEL, "prompt": "hello", "max_tokens": 8} | body
        async with self.http.post(f"{self.url}/v1/completions", json=document, headers=headers) as response:
            return response.status, await response.json()

    async def metrics(self) -> dict[str, float]:
        """Samples by name and labels as the page writes them."""
        async with self.http.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


@asynccontextmanager
async def serving(
    engine: Any,
    *,
    profile: Profile | None = None,
    pacer: Pacer | None = None,
    eos_token_ids: frozenset[int] = frozenset({END}),
    certificate_poll_s: float = 10.0,
    **settings: Any,
) -> AsyncIterator[Served]:
    announced: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
    process = ServingProcess(
        engine,
        default_settings(**settings),
        model_digest=DIGEST,
        eos_token_ids=eos_token_ids,
        block_tokens=16,
        profile=profile,
        pacer=pacer,
        started_s=time.monotonic(),
        announce=announced.set_result,
        certificate_poll_s=certificate_poll_s,
    )
    task = asyncio.create_task(process.run(handle_signals=False))
    await asyncio.wait([task, announced], return_when=asyncio.FIRST_COMPLETED, timeout=20)
    if task.done():
        task.result()
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as http:
            yield Served(process, announced.result(), http)
    finally:
        process.stop(grace_s=0.0)
        await asyncio.wait_for(task, 20)


async def until(condition: Any, what: str, timeout_s: float = 10.0) -> None:
    """Poll a condition up to a deadline; the failure says what never came true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.005)
