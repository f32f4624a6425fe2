"""A soak of one serving process: requests over HTTP with cancels and bad ones among them, a switch at every step.

    python -m evidence.runtime_soak [--requests N] [--seed S]      prints the counts as JSON

The embedded model, its real engine and server; memory for an eighth of the contexts that may run, so that requests are
stopped and go on; prompts of few beginnings, so that blocks are shared. The client runs in the same process: what it
leaks would count too.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from prism_runtime.engine.engine import Engine
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.types import Plan, StepReport
from prism_runtime.server.app import ServingProcess
from prism_runtime.server.settings import ServeSettings, add_serve_flags

ARTIFACT = Path(__file__).parents[1] / "examples" / "model" / "artifact"
CONTEXT, SEQUENCES, CLIENTS = 128, 24, 40
BAD_SHARE, CANCELLED_SHARE, STREAMED_SHARE = 0.05, 0.15, 0.5
WARM_SHARE = 0.2
"""Memory is compared with what it was after so many of the requests: allocators and caches are filled by then."""


@dataclass(slots=True)
class Soaked:
    """What a soak found. `failed_requests` are good ones that the client did not abandon and that got no whole answer,
    and bad ones that were not refused with a status from 400 to 499."""

    requests: int = 0
    good: int = 0
    bad: int = 0
    cancelled: int = 0
    failed_requests: int = 0
    steps: int = 0
    switches: int = 0
    preemptions: int = 0
    prompt_tokens_known: int = 0
    leaked_blocks: int = 0
    leaked_tasks: int = 0
    rss_growth_megabytes: float = 0.0


class SwitchingEngine(Engine):
    """Every step begins with operating points drawn anew for all classes."""

    def follow(self, seed: int) -> None:
        self._points = random.Random(seed)
        self.steps = self.switches = 0

    def step(self) -> StepReport:
        points = tuple(self._points.randrange(len(self.ladder)) for _ in range(CLASS_SLOTS))
        self.switches += points != self.plan.class_point
        self.steps += 1
        with self._lock:
            version = (self._pending_plan or self.plan).version
        self.set_plan(Plan(version, points))
        return super().step()


def soak(requests: int = 10_000, seed: int = 0) -> Soaked:
    """Send so many requests and count what went wrong. Minutes of one core for 10,000."""
    return asyncio.run(_soak(requests, seed))


async def _soak(requests: int, seed: int) -> Soaked:
    engine = SwitchingEngine.from_artifact(
        ARTIFACT,
        max_sequences=SEQUENCES,
        max_context_tokens=CONTEXT,
        kv_tokens=SEQUENCES * CONTEXT // 8,
        prefill_tokens_per_step=96,
        classes=CLASS_SLOTS,
    )
    engine.follow(seed)
    found, draws = Soaked(requests=requests), random.Random(seed)
    texts = [[draws.randrange(engine.vocabulary_size) for _ in range(CONTEXT)] for _ in range(12)]
    async with _serving(engine) as url:
        tasks = len(asyncio.all_tasks())
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
            warm_megabytes = await _send(http, url, engine, requests, seed, texts, found)
        await asyncio.sleep(1.0)  # what the last clients abandoned ends, and their connections close
        found.rss_growth_megabytes = round(resident_megabytes() - warm_megabytes, 2)
        found.leaked_tasks = max(0, len(asyncio.all_tasks()) - tasks)
    load, pool = engine.load(), engine.scheduler.pool
    found.leaked_blocks = load.kv_blocks_used + (pool.blocks - pool.available - pool.used)
    found.steps, found.switches = engine.steps, engine.switches
    found.preemptions, found.prompt_tokens_known = load.preemptions, load.prompt_tokens_known
    return found


async def _send(
    http: aiohttp.ClientSession,
    url: str,
    engine: Engine,
    requests: int,
    seed: int,
    texts: list[list[int]],
    found: Soaked,
) -> float:
    """All requests, from as many clients as there are; returns resident megabytes after the warm share of them."""
    left, warm_megabytes = iter(range(requests)), 0.0

    async def client() -> None:
        nonlocal warm_megabytes
        for number in left:
            if number == int(requests * WARM_SHARE):
                warm_megabytes = resident_megabytes()
            await _one(http, url, engine.manifest.source.name, random.Random(f"{seed}-{number}"), texts, found)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return warm_megabytes


async def _one(
    http: aiohttp.ClientSession, url: str, model: str, draws: random.Random, texts: list[list[int]], found: Soaked
) -> None:
    prompt = draws.choice(texts)[: draws.randint(1, 90)] + [draws.randrange(100) for _ in range(draws.randint(0, 8))]
    tokens = min(draws.choice([24, 90]), CONTEXT - len(prompt))  # the longest outgrow what was free when they began
    tokens = draws.randint(1, tokens)
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": draws.random() < STREAMED_SHARE, "temperature": draws.choice([0.0, 1.0])}
    kind = draws.random()
    if kind < BAD_SHARE:
        found.bad += 1
        found.failed_requests += not await _is_refused(http, url, body | _spoilt(draws))
    elif kind < BAD_SHARE + CANCELLED_SHARE:
        found.cancelled += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(
                _answered(http, url, body | {"max_tokens": CONTEXT - len(prompt)}), draws.uniform(0.0, 0.5)
            )
    else:
        found.good += 1
        found.failed_requests += await _answered(http, url, body) != tokens


def _spoilt(draws: random.Random) -> dict[str, Any]:
    return draws.choice(
        [
            {"prompt": [1] * (CONTEXT + 1)},
            {"prompt": []},
            {"prompt": [10**9]},
            {"max_tokens": 0},
            {"temperature": -1.0},
            {"top_p": 2.0},
            {"model": "another"},
            {"unknown": 1},
            {"logit_bias": {"999999999": 1.0}},
        ]
    )


async def _is_refused(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> bool:
    async with http.post(url, json=body) as response:
        await response.read()
        return 400 <= response.status < 500


async def _answered(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> int:
    """Tokens of a whole answer; -1 for anything else."""
    async with http.post(url, json=body) as response:
        if response.status != 200:
            return -1
        if not body["stream"]:
            return int((await response.json())["usage"]["completion_tokens"])
        events = [line async for line in response.content if line.startswith(b"data: ")]
        return len(events) - 1 if events[-1].strip() == b"data: [DONE]" else -1


@asynccontextmanager
async def _serving(engine: Engine) -> AsyncIterator[str]:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, Path("unused"))
    flags = ["artifact", "--port", "0", "--metrics-port", "0", "--drain-grace", "0", "--drain-seconds", "5"]
    ports: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
    process = ServingProcess(
        engine,
        replace(ServeSettings.of(parser.parse_args(flags)), no_profile=True),
        model_digest="sha256:" + "0" * 64,
        eos_token_ids=frozenset(),
        block_tokens=BLOCK_TOKENS,
        profile=None,
        pacer=None,
        started_s=time.monotonic(),
        announce=ports.set_result,
    )
    task = asyncio.create_task(process.run(handle_signals=False))
    try:
        yield f"http://127.0.0.1:{(await ports)['port']}/v1/completions"
    finally:
        process.stop(grace_s=0.0)
        await task


def resident_megabytes() -> float:
    """Resident memory of this process, after garbage and free pages have been given back."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(asdict(soak(arguments.requests, arguments.seed)), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
