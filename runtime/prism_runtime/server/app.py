"""Wires one serving process: engine thread, ports, certificates, signals, drain."""

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry

from prism_api.manifest import Manifest
from prism_api.profile import Profile
from prism_runtime.engine.governor import Governor
from prism_runtime.engine.loop import EngineLoop, SteppingEngine
from prism_runtime.engine.pace import Pacer
from prism_runtime.server.accounting import Accounting
from prism_runtime.server.control import ControlApi
from prism_runtime.server.dispatch import Dispatcher
from prism_runtime.server.drain import Lifecycle, drain
from prism_runtime.server.exposition import metrics_app
from prism_runtime.server.local import LOCAL_UID, LocalControl, bind
from prism_runtime.server.metrics import Latencies, LiveState
from prism_runtime.server.openai import OpenAiApi, ServedModel
from prism_runtime.server.report import PodIdentity, Reporter
from prism_runtime.server.settings import ServeSettings
from prism_runtime.server.tls import Certificates
from prism_runtime.server.tokenizer import TextCodec

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""For clients that read slowly to take the last bytes, after every answer is complete."""


class ServableEngine(SteppingEngine, Protocol):
    """What the server needs of `engine.Engine` beyond stepping."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_context_tokens(self) -> int: ...


class ServingProcess:
    """One engine behind its ports. `run` returns when it was told to stop and has drained."""

    def __init__(
        self,
        engine: ServableEngine,
        settings: ServeSettings,
        *,
        model_digest: str,
        eos_token_ids: frozenset[int],
        block_tokens: int,
        profile: Profile | None,
        pacer: Pacer | None,
        started_s: float,
        announce: Callable[[dict[str, int]], None] = lambda ports: None,
        certificate_poll_s: float = 10.0,
    ) -> None:
        self._settings = settings
        self._announce = announce
        self._stop = asyncio.Event()
        self._grace_s = settings.drain_grace
        self._eos_token_ids = eos_token_ids
        self._engine = engine
        service_uid = settings.service_uid or (LOCAL_UID if settings.local_control else None)
        governor = Governor(
            engine.ladder,
            model_digest=model_digest,
            boot_point=settings.boot_point,
            now_s=time.monotonic(),
            service_uid=service_uid,
        )
        self.engine_loop = EngineLoop(engine, governor, pacer=pacer, watchdog_s=settings.watchdog_seconds)
        self.lifecycle = Lifecycle(ready_at_s=started_s + settings.pace_start_seconds)
        self.accounting = Accounting(engine.ladder)
        self.accounting.follow(governor.classes)
        self.registry = CollectorRegistry()
        model_name = settings.served_name or engine.manifest.source.name
        self._latencies = Latencies(self.registry, model_name)
        self.certificates = (
            Certificates(settings.tls_dir, poll_s=certificate_poll_s) if settings.tls_dir is not None else None
        )
        self.dispatcher = Dispatcher(self.engine_loop, self.accounting, self._latencies)
        self.registry.register(
            LiveState(
                model_name=model_name,
                manifest=engine.manifest,
                block_tokens=block_tokens,
                engine_loop=self.engine_loop,
                accounting=self.accounting,
                cert_not_after_s=lambda: self.certificates.not_after_s if self.certificates else {},
            )
        )
        pod = PodIdentity(
            name=settings.pod_name,
            uid=settings.pod_uid,
            image_digest=settings.image_digest,
            accelerator=settings.accelerator or (profile.accelerator if profile else "cpu"),
            model_digest=model_digest,
        )
        self.reporter = Reporter(pod, self.engine_loop, self.accounting, self.lifecycle, profile)
        self._service_uid = service_uid
        self._model_name = model_name

    async def run(self, *, handle_signals: bool = True) -> None:
        """Serve until `stop` or a signal, then drain. Raises OSError if a port is taken."""
        async with AsyncExitStack() as stack:
            ports, service, api = await self._open(stack)
            self.engine_loop.start(self.dispatcher)
            stack.callback(self.engine_loop.stop)
            if handle_signals:
                self._handle_signals()
            log.info("serving", extra={"model": self._model_name, **ports})
            self._announce(ports)
            await self._stop.wait()

            async def close_doors() -> None:
                for site in list(service.sites):
                    await site.stop()
                if service.server:
                    api.close_idle(service.server.connections)

            await drain(
                self.lifecycle,
                self.dispatcher,
                grace_s=self._grace_s,
                drain_s=self._settings.drain_seconds,
                close_doors=close_doors,
            )

    def stop(self, *, grace_s: float | None = None) -> None:
        """Begin to drain; the second call changes nothing."""
        if grace_s is not None and not self._stop.is_set():
            self._grace_s = grace_s
        self._stop.set()

    def _handle_signals(self) -> None:
        event_loop = asyncio.get_running_loop()

        def interrupted() -> None:
            """Ctrl-C: no endpoints to wait for; the second one does not wait for answers either."""
            if self._stop.is_set():
                event_loop.remove_signal_handler(signal.SIGINT)
                self.dispatcher.fail_all("the server was interrupted")
            self.stop(grace_s=0.0)

        event_loop.add_signal_handler(signal.SIGTERM, self.stop)
        event_loop.add_signal_handler(signal.SIGINT, interrupted)

    async def _open(self, stack: AsyncExitStack) -> tuple[dict[str, int], web.AppRunner, OpenAiApi]:
        """Bind every port. Raises OSError if one is taken."""
        settings = self._settings
        api = OpenAiApi(
            ServedModel(
                name=self._model_name,
                created_s=int(time.time()),
                max_context_tokens=self._engine.max_context_tokens,
                eos_token_ids=self._eos_token_ids,
            ),
            TextCodec(self._engine.tokenizer),
            self.dispatcher,
            self.lifecycle,
            self.registry,
            settings.class_header,
        )
        ports = {}
        service = await _runner(stack, api.app())
        ports["port"] = await _listen(service, settings.host, settings.port)
        metrics = await _runner(stack, metrics_app(self.registry))
        ports["metrics_port"] = await _listen(metrics, settings.host, settings.metrics_port)
        if settings.local_control:
            local = LocalControl(self.dispatcher, self.accounting, self._service_uid or LOCAL_UID)
            runner = await _runner(stack, local.app())
            await web.SockSite(runner, bind(settings.local_control)).start()
            stack.callback(settings.local_control.unlink, missing_ok=True)
        if self.certificates:
            control = ControlApi(self.dispatcher, self.reporter, self.accounting, self._latencies, self.certificates)
            ports["control_port"] = await self._open_control(stack, control.app(), self.certificates)
        return ports, service, api

    async def _open_control(self, stack: AsyncExitStack, app: web.Application, certificates: Certificates) -> int:
        """Reserve the port, listen once the certificates are there: a late Secret must not keep a pod from serving."""
        listener = socket.socket(socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET)
        stack.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._settings.host, self._settings.control_port))
        port = int(listener.getsockname()[1])
        runner = await _runner(stack, app)

        async def listen_and_follow() -> None:
            await certificates.wait()
            await web.SockSite(runner, listener, ssl_context=certificates.context).start()
            log.info("control port open", extra={"control_port": port})
            await certificates.follow()

        task = asyncio.create_task(listen_and_follow())

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        stack.push_async_callback(end)
        return port


async def _runner(stack: AsyncExitStack, app: web.Application) -> web.AppRunner:
    """A runner that ends a handler as soon as its client is gone, and is closed with the stack."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner


async def _listen(runner: web.AppRunner, host: str, port: int) -> int:
    """Bind and return the port (that of the first socket if 0 was asked for)."""
    await web.TCPSite(runner, host, port, backlog=1024).start()
    return int(runner.addresses[-1][1])


def read_eos_token_ids(artifact: Path) -> frozenset[int]:
    """End-of-text ids of a checkpoint: its generation config, else its model config. Empty if neither names one."""
    for name in ("generation_config.json", "config.json"):
        with suppress(FileNotFoundError):
            value = json.loads((artifact / name).read_text()).get("eos_token_id")
            if value is not None:
                return frozenset(value) if isinstance(value, list) else frozenset({value})
    return frozenset()
