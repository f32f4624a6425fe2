"""HTTP of the operator itself: /metrics on one port, /healthz and /readyz on another; and the event loop's lag.

Both probes run in the loop that does the work: a loop that is stuck answers neither, and the kubelet restarts it.
"""

import asyncio
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from prism_operator import metrics

LAG_PERIOD_S = 0.5


class Exposition:
    """Two listeners; ports may be 0, `metrics_port` and `health_port` say what was bound."""

    def __init__(self, is_ready: Callable[[], bool], why_dead: Callable[[], str | None]) -> None:
        self._is_ready, self._why_dead = is_ready, why_dead
        self._runners: list[web.AppRunner] = []
        self.metrics_port = self.health_port = 0

    async def start(self, host: str, metrics_port: int, health_port: int) -> None:
        """Raises OSError when a port is taken."""
        exposition = web.Application()
        exposition.router.add_get("/metrics", self._metrics)
        probes = web.Application()
        probes.router.add_get("/healthz", self._healthz)
        probes.router.add_get("/readyz", self._readyz)
        self.metrics_port = await self._listen(exposition, host, metrics_port)
        self.health_port = await self._listen(probes, host, health_port)

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _listen(self, application: web.Application, host: str, port: int) -> int:
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port).start()
        bound: int = runner.addresses[0][1]
        return bound

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _: web.Request) -> web.Response:
        if reason := self._why_dead():
            return web.Response(status=503, text=reason)
        return web.Response(text="ok")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok") if self._is_ready() else web.Response(status=503, text="not synced yet")


async def measure_loop_lag() -> None:
    """Export how late the loop wakes a sleeper, until cancelled; decisions are late by as much."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        metrics.LOOP_LAG.set(max(0.0, loop.time() - due_s))
