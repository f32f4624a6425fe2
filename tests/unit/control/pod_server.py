"""A pod's control port for tests: real sockets, real certificates, answers chosen by the test."""

import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import web

from prism_api.control import Directive, Held, Load, ModelReference, PodReference, Report, RuntimeReference, Steps
from prism_operator import pki

DIGEST = "sha256:" + "a" * 64
Answerer = Callable[[web.Request], Awaitable[web.Response]]


def report(uid: str = "pod-1", **changes) -> Report:
    fields = {
        "pod": PodReference(name=uid, uid=uid),
        "start_id": "start-1",
        "runtime": RuntimeReference(image_digest="sha256:x", accelerator="cpu"),
        "model": ModelReference(digest=DIGEST),
        "held": Held(),
        "effective": [],
        "load": Load(running=0, waiting=0, kv_blocks=10, kv_blocks_used=0, preemptions=0),
        "classes": [],
        "steps": Steps(count=0, busy_ms=0),
        "ready": True,
        "draining": False,
    }
    return Report(**{**fields, **changes})


def json_report(**changes) -> web.Response:
    return web.Response(text=report(**changes).model_dump_json(by_alias=True, exclude_none=True))


async def acknowledge(request: web.Request) -> web.Response:
    directive = Directive.model_validate_json(await request.read())
    return json_report(held=Held(epoch=directive.epoch, sequence=directive.sequence, state="Managed"))


class PodServer:
    """Serves GET /v1/report and PUT /v1/directive for one service name on 127.0.0.1."""

    def __init__(self, authority: pki.KeyPair, folder: Path, namespace: str = "team-a", service: str = "chat") -> None:
        leaf = pki.issue_server(authority, namespace, service, datetime.now(UTC), pki.Lifetimes())
        (folder / "leaf.pem").write_bytes(leaf.certificate + leaf.private_key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.load_cert_chain(folder / "leaf.pem")
        self.context.load_verify_locations(cadata=authority.certificate.decode())
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.on_report: Answerer = self._empty
        self.on_directive: Answerer = acknowledge
        self.connections: set[object] = set()
        self.requests = 0
        self.port = 0

    async def __aenter__(self) -> "PodServer":
        application = web.Application()
        application.router.add_get("/v1/report", self._route("on_report"))
        application.router.add_put("/v1/directive", self._route("on_directive"))
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self.context).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def _route(self, name: str) -> Answerer:
        async def handle(request: web.Request) -> web.Response:
            self.requests += 1
            self.connections.add(request.transport.get_extra_info("peername"))
            return await getattr(self, name)(request)

        return handle

    @staticmethod
    async def _empty(_: web.Request) -> web.Response:
        return json_report()
