"""`prism-runtime budget` against a serving process on the same machine."""

import asyncio
import stat
from pathlib import Path

import pytest

from prism_runtime.__main__ import main
from prism_runtime.server.local import SocketInUse, bind
from tests.runtime.serving.engine import ScriptedEngine
from tests.runtime.serving.process import Served, serving, until


async def budget(capsys: pytest.CaptureFixture[str], socket: Path, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = await asyncio.to_thread(main, ["budget", *arguments, "--socket", str(socket)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def live_point(table: str) -> str:
    return next(line.split()[0] for line in table.splitlines() if "<- default" in line)


def test_budget_is_switched_while_a_stream_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = tmp_path / "run" / "control.sock"

    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"x" * 500, step_s=0.002)
        async with serving(engine, local_control=socket) as served:
            stream = asyncio.create_task(served.complete(max_tokens=400))
            await until(lambda: len(engine.steps) > 5, "the stream runs")
            status, table = await budget(capsys, socket, "get")
            assert (status, live_point(table)) == (0, "full")
            assert "0.99 (0.989)" in table
            status, table = await budget(capsys, socket, "set", "b500")
            assert (status, live_point(table)) == (0, "b500")
            status, table = await budget(capsys, socket, "set", "--permille", "800")
            assert (status, live_point(table)) == (0, "b750")
            assert not stream.done()
            assert (await stream)[0] == 200
            assert set(served.process.accounting.totals["default"].tokens_by_point) == {"full", "b500", "b750"}

    asyncio.run(scenario())


def test_budget_refuses_unknown_points_and_classes_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = tmp_path / "control.sock"

    async def scenario() -> None:
        async with serving(ScriptedEngine(), local_control=socket):
            for arguments, says in (
                (("set", "b1"), "known: b500, b750, full"),
                (("set", "--permille", "100"), "below the smallest operating point of this model, 500"),
                (("set", "b500", "--class", "gold"), "unknown class 'gold'; known: default"),
            ):
                status, printed = await budget(capsys, socket, *arguments)
                assert status == 1
                assert says in printed
            assert live_point((await budget(capsys, socket, "get"))[1]) == "full"

    asyncio.run(scenario())


def test_socket_belongs_to_the_user_alone_and_is_gone_after_the_drain(tmp_path: Path) -> None:
    socket = tmp_path / "new" / "control.sock"

    async def scenario() -> None:
        async with serving(ScriptedEngine(), local_control=socket):
            assert stat.S_IMODE(socket.stat().st_mode) == 0o600
            assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert not socket.exists()

    asyncio.run(scenario())


def test_socket_of_a_dead_process_is_replaced_and_that_of_a_living_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    bind(path).close()  # what a killed process leaves behind
    with bind(path) as living:
        living.listen()
        with pytest.raises(SocketInUse, match="another prism-runtime serves"):
            bind(path)


def test_local_setting_outlives_its_envelope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = tmp_path / "control.sock"

    async def scenario() -> None:
        async with serving(ScriptedEngine(), local_control=socket) as served:
            await budget(capsys, socket, "set", "b750")
            assert expired_point(served) == "b750"

    asyncio.run(scenario())


def expired_point(served: Served) -> str:
    """Where the governor would stand two days later."""
    import time

    governor = served.process.engine_loop.governor
    for _ in range(10):
        governor.tick({}, time.monotonic() + 172_800)
    return governor.ladder.names[governor.point_of("default")]
