"""Local control: one user turns the budget of the process on their own machine, over a Unix socket.

For laptops only, never beside the operator's control port: both would count up the same fence. The socket's folder and
file belong to the user alone (0700, 0600), so the file system is the authentication.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from aiohttp import web

from prism_api.control import Admission, ClassDirective, Directive, Envelope, Held, ServiceReference
from prism_runtime.engine.governor import Refused, ServiceClass
from prism_runtime.engine.loop import EngineLoop
from prism_runtime.server.accounting import Accounting
from prism_runtime.server.control import SETTLE_S
from prism_runtime.server.dispatch import Dispatcher

LOCAL_UID = "local"
HOLD_MS = 86_400_000
"""Envelope of a local setting. Floor and ceiling are the chosen point, so that it also holds after the envelope."""


class SocketInUse(OSError):
    """Another process serves on this socket."""


def bind(path: Path) -> socket.socket:
    """A listening socket at `path` for this user alone; replaces one left behind by a process that is gone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
            else:
                raise SocketInUse(
                    f"another prism-runtime serves at '{path}'; stop it, or choose another --local-control path"
                )
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


class LocalControl:
    """GET /v1/budget and PUT /v1/budget {"point": NAME, "class": NAME or absent for all}."""

    def __init__(self, dispatcher: Dispatcher, accounting: Accounting, service_uid: str) -> None:
        self._dispatcher = dispatcher
        self._accounting = accounting
        self._service_uid = service_uid

    @property
    def _engine_loop(self) -> EngineLoop:
        return self._dispatcher.engine_loop

    def app(self) -> web.Application:
        app = web.Application(client_max_size=4096)
        app.router.add_get("/v1/budget", self._get)
        app.router.add_put("/v1/budget", self._put)
        return app

    async def _get(self, _: web.Request) -> web.Response:
        return web.json_response(self._budget())

    async def _put(self, request: web.Request) -> web.Response:
        try:
            wanted = json.loads(await request.read())
            point, class_name = str(wanted["point"]), wanted.get("class")
        except (ValueError, KeyError, TypeError, AttributeError):
            return web.json_response({"error": 'the body must be {"point": NAME, "class": NAME}'}, status=400)
        table = self._engine_loop.classes
        if class_name is not None and class_name not in table.live:
            known = ", ".join(table.live)
            return web.json_response({"error": f"unknown class '{class_name}'; known: {known}"}, status=422)
        if point not in self._engine_loop.engine.ladder:
            known = ", ".join(self._engine_loop.engine.ladder.names)
            return web.json_response({"error": f"unknown operating point '{point}'; known: {known}"}, status=422)
        answer: Held | Refused = self._engine_loop.apply(self._directive(point, class_name))
        if isinstance(answer, Refused):
            return web.json_response({"error": answer.error}, status=answer.status)
        self._accounting.follow(self._engine_loop.classes)
        await self._dispatcher.settled(SETTLE_S)
        return web.json_response(self._budget())

    def _budget(self) -> dict[str, Any]:
        engine = self._engine_loop.engine
        plan, names = engine.plan, engine.ladder.names
        return {
            "points": [point.to_wire() for point in engine.ladder.points],
            "classes": [
                {"name": name, "point": names[plan.class_point[c.slot]]}
                for name, c in self._engine_loop.classes.live.items()
            ],
            "planVersion": plan.version,
        }

    def _directive(self, point: str, class_name: str | None) -> Directive:
        table, held, names = self._engine_loop.classes, self._engine_loop.held(), self._engine_loop.engine.ladder.names

        def ordered(c: ServiceClass) -> ClassDirective:
            chosen = point if class_name in (None, c.name) else names[c.ordered]
            return ClassDirective(
                name=c.name,
                priority=c.priority,
                ttft_ms=round(c.ttft_s * 1000) if c.ttft_s else None,
                tpot_ms=round(c.tpot_s * 1000) if c.tpot_s else None,
                point=chosen,
                floor=chosen,
                ceiling=chosen,
                admission=Admission.SHED if c.shed else Admission.ACCEPT,
            )

        return Directive(
            service=ServiceReference(namespace="local", name="local", uid=self._service_uid),
            holder="local-control",
            epoch=held.epoch,
            sequence=held.sequence + 1,
            default_class=table.default,
            classes=[ordered(c) for c in table.live.values()],
            envelope=Envelope(ttl_ms=HOLD_MS, safe_point=names[0]),
            reason="LocalControl",
        )
