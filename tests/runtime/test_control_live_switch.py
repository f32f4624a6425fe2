"""The embedded model while its budget turns: the switch is real, and nobody's answer notices more than its text."""

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prism_api.points import Ladder
from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.pace import Pacer, load_profile
from prism_runtime.engine.profiling import Limits, measure_profile
from prism_runtime.engine.shipped_profile import FOLDER
from prism_runtime.engine.types import StepReport, Token
from prism_runtime.server.serve import profile_of
from tests.runtime.serving.authority import SERVER_NAME, Authority
from tests.runtime.serving.process import SERVICE_UID, Served, serving, until
from tests.runtime.test_control_api import make_class, make_directive

ARTIFACT = Path(__file__).parents[2] / "examples" / "model" / "artifact"
PROMPT = "And it came to pass"


class RecordedEngine(Engine):
    """The engine, with its step reports kept."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.reports: list[StepReport] = []

    def step(self) -> StepReport:
        report = super().step()
        self.reports.append(report)
        return report


@pytest.fixture(scope="module")
def loaded() -> RecordedEngine:
    engine = RecordedEngine.from_artifact(ARTIFACT, max_sequences=50, classes=CLASS_SLOTS)
    assert isinstance(engine, RecordedEngine)
    return engine


@pytest.fixture
def engine(loaded: RecordedEngine) -> Iterator[RecordedEngine]:
    loaded.reports.clear()
    yield loaded
    assert not loaded.has_work


async def stream(served: Served, seed: int, max_tokens: int, **headers: str) -> tuple[int, int, bool]:
    """(status, pieces, ended with [DONE]) of one stream."""
    body = {"model": "small-moe", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "seed": seed}
    url = f"{served.url}/v1/completions"
    async with served.http.post(url, json=body | {"stream": True}, headers=headers) as response:
        events = [line async for line in response.content if line.startswith(b"data: ")]
    return response.status, len(events) - 1, events[-1] == b"data: [DONE]\n"


def even_profile(ladder: Ladder, step_s: float) -> Profile:
    """Steps of one length at every point: long enough that a directive can reach the pod between any two of them."""
    cost = PointProfile(
        step_base_nanoseconds=round(step_s * 1e9),
        step_per_sequence_nanoseconds=0,
        step_per_kilotoken_nanoseconds=0,
        prefill_base_nanoseconds=0,
        prefill_per_token_nanoseconds=0,
    )
    return Profile(
        accelerator="test",
        provenance="made up for a test",
        max_sequences=50,
        kv_tokens=25_600,
        prefill_tokens_per_step=512,
        points=dict.fromkeys(ladder.names, cost),
    )


async def switch_until(served: Served, context: Any, done: asyncio.Event, points: list[str]) -> int:
    """Order the points in turn, each as soon as the last was acknowledged; returns how many were."""
    url = f"https://127.0.0.1:{served.ports['control_port']}/v1/directive"
    acknowledged = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http:
        while not done.is_set():
            point = points[acknowledged % len(points)]
            classes = [make_class(point=point, floor="b250"), make_class(name="safe", floor="full")]
            for c in classes:
                c |= {"ttftMs": None, "tpotMs": None}
            directive = make_directive(1, acknowledged + 1, classes=classes, modelDigest=None)
            async with http.put(url, json=directive, server_hostname=SERVER_NAME) as response:
                assert response.status == 200, await response.text()
            acknowledged += 1
    return acknowledged


def test_fifty_streams_survive_a_switch_at_every_step_and_each_token_has_one_plan_version(
    tmp_path: Path, engine: RecordedEngine
) -> None:
    async def scenario() -> None:
        authority = Authority()
        authority.write_server(tmp_path / "tls")
        context = authority.client(tmp_path / "operator")
        pacer = Pacer(even_profile(engine.ladder, step_s=0.05), engine.ladder)
        async with serving(engine, pacer=pacer, tls_dir=tmp_path / "tls", service_uid=SERVICE_UID) as served:
            await until(lambda: served.process.certificates.state, "the control port is open")
            done = asyncio.Event()
            switching = asyncio.create_task(switch_until(served, context, done, ["b500", "full", "b750"]))
            await until(lambda: served.process.engine_loop.held().sequence, "switching has begun")
            classes = [{"x-prism-class": "safe"} if i % 5 == 0 else {} for i in range(50)]
            streams = await asyncio.gather(*(stream(served, i, 24, **classes[i]) for i in range(50)))
            done.set()
            switches = await switching
            assert streams == [(200, 24, True)] * 50
            check_tokens(engine.reports, engine.ladder.index("full"), served)
            working = [report for report in engine.reports if not report.idle]
            versions = {report.plan.version for report in working}
            assert len(versions) >= 0.8 * len(working), (len(versions), len(working), switches)
            counters = served.process.accounting.totals
            assert counters["safe"].tokens_by_point == {"full": 240}
            assert len(counters["gold"].tokens_by_point) == 3
            assert sum(counters["gold"].tokens_by_point.values()) == 960

    asyncio.run(scenario())


def check_tokens(reports: list[StepReport], full: int, served: Served) -> None:
    """Within a step every token has the step's plan version, and the point that this plan gives its class."""
    safe = served.process.engine_loop.classes.live["safe"].slot
    previous = 0
    for report in reports:
        assert report.plan.version >= previous
        previous = report.plan.version
        if report.plan.version > 2:  # before the first directive there is no class 'safe'
            assert report.plan.class_point[safe] == full
        for event in report.events:
            if isinstance(event, Token):
                assert event.plan_version == report.plan.version
                assert event.point in report.plan.class_point


def test_stream_that_runs_while_another_class_is_switched_gives_the_text_of_an_undisturbed_run(
    tmp_path: Path, engine: RecordedEngine
) -> None:
    async def text(served: Served) -> str:
        body = {"model": "small-moe", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        headers = {"x-prism-class": "safe"}
        async with served.http.post(f"{served.url}/v1/completions", json=body, headers=headers) as response:
            return str((await response.json())["choices"][0]["text"])

    async def scenario() -> None:
        authority = Authority()
        authority.write_server(tmp_path / "tls")
        context = authority.client(tmp_path / "operator")
        async with serving(engine, tls_dir=tmp_path / "tls", service_uid=SERVICE_UID) as served:
            undisturbed = await text(served)
            await until(lambda: served.process.certificates.state, "the control port is open")
            done = asyncio.Event()
            switching = asyncio.create_task(switch_until(served, context, done, ["b250", "full"]))
            await until(lambda: served.process.engine_loop.held().sequence, "switching has begun")
            answers = await asyncio.gather(text(served), *(stream(served, i, 40) for i in range(4)))
            done.set()
            await switching
            assert answers[0] == undisturbed

    asyncio.run(scenario())


def test_pace_prescribes_the_step_time_at_each_point(engine: RecordedEngine) -> None:
    """Counted in steps and prescribed time, so that a busy machine cannot change the answer."""
    profile = load_profile("demo")
    pacer = Pacer(profile, engine.ladder)

    async def scenario() -> None:
        async with serving(engine, profile=profile, pacer=pacer) as served:
            assert await stream(served, 1, 10) == (200, 10, True)
            totals = served.process.engine_loop.totals
            working = [report for report in engine.reports if not report.idle]
            prescribed_s = sum(pacer.step_s(report) for report in working)
            assert totals.count == len(working)
            assert totals.busy_s >= prescribed_s
            assert totals.busy_s - prescribed_s < pacer.lag_s + 0.02 * len(working)
            assert served.process.reporter.report().runtime.accelerator == "demo-gpu"

    asyncio.run(scenario())


def test_profile_that_the_artifact_brings_is_corrected_and_not_measured_again(tmp_path: Path) -> None:
    engine = Engine.from_artifact(ARTIFACT, max_sequences=2, max_context_tokens=64, classes=CLASS_SLOTS)
    before, limits = engine.plan, Limits(2, 64, 512, 128)
    measured = profile_of(engine, tmp_path, limits, "cpu")
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "cpu.json").write_text(json.dumps(measured.to_wire()))
    shipped = profile_of(engine, tmp_path, limits, "cpu")
    assert shipped.provenance.startswith(f"{measured.provenance}; costs times ")
    factors = [
        shipped.points[name].step_seconds(2, 64, 0) / cost.step_seconds(2, 64, 0)
        for name, cost in measured.points.items()
    ]
    assert max(factors) == pytest.approx(min(factors), rel=1e-3), "one factor for all"
    assert engine.plan == before
    assert not engine.has_work


def test_profile_of_the_real_engine_prices_every_point_and_leaves_the_engine_idle() -> None:
    engine = Engine.from_artifact(ARTIFACT, max_sequences=2, max_context_tokens=64, classes=CLASS_SLOTS)
    before = engine.plan
    profile = measure_profile(engine, Limits(2, 64, 512, 128), accelerator="cpu")
    assert list(profile.points) == engine.ladder.names
    assert all(point.step_seconds(1, 32, 0) > 0 for point in profile.points.values())
    assert engine.plan == before
    assert not engine.has_work
    assert engine.load().prompt_tokens_known == 0, "what is known already costs nothing and would not be measured"


def test_served_command_drains_real_streams_logs_json_without_user_text_and_writes_only_to_tmp(tmp_path: Path) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    # The compiled kernel is kept where caches go; in the image that lies below /tmp, as does the home folder.
    environment = {"HOME": str(home), "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(scratch / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = ["--port", "0", "--metrics-port", "0", "--pace", "demo", "--drain-grace", "0.2", "--boot-point", "b500"]

    async def scenario() -> None:
        command = [sys.executable, "-m", "prism_runtime", "serve", str(ARTIFACT), *flags]
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=home, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            line = {"message": "compiled code loaded"}
            while line["message"] == "compiled code loaded":
                line = json.loads(await asyncio.wait_for(process.stderr.readline(), 120))
            assert line["message"] == "serving", line
            url = f"http://127.0.0.1:{line['port']}/v1/completions"
            async with aiohttp.ClientSession() as http:
                begun = [asyncio.Event() for _ in range(6)]
                streams = [asyncio.create_task(read(http, url, event)) for event in begun]
                await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
                process.send_signal(signal.SIGTERM)
                assert await asyncio.gather(*streams) == [("b500", b"data: [DONE]")] * 6
            rest = (await asyncio.wait_for(process.stderr.read(), 60)).decode()
            assert await asyncio.wait_for(process.wait(), 30) == 0
            assert [json.loads(line)["level"] for line in rest.splitlines()] == ["info", "info"]
            assert PROMPT not in rest
            assert list(home.iterdir()) == []
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(scenario())


async def read(http: aiohttp.ClientSession, url: str, begun: asyncio.Event) -> tuple[str, bytes]:
    body = {"model": "small-moe", "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}
    last = b""
    async with http.post(url, json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                last = line.strip()
                begun.set()
    return response.headers["x-prism-operating-point"], last
