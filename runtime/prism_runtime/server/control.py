"""The control API: the operator's directives in, reports out, over mutual TLS.

A valid certificate chain is not enough: the same authority signs every service's server certificate, so the client's
must carry the operator's identity, and nothing else. Contract: `prism_api.control`.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any, get_args

from aiohttp import web
from pydantic import ValidationError

from prism_api.base import Document
from prism_api.control import CONTROL_VERSION, MAX_BODY_BYTES, OPERATOR_IDENTITY, Directive, Refusal
from prism_runtime.engine.governor import Refused
from prism_runtime.server.accounting import Accounting
from prism_runtime.server.dispatch import Dispatcher
from prism_runtime.server.metrics import Latencies
from prism_runtime.server.report import Reporter
from prism_runtime.server.tls import Certificates

log = logging.getLogger(__name__)

SETTLE_S = 0.25
"""How long a PUT waits for its plan to be live, so that its answer acknowledges: longer than one step of a large model,
shorter than the operator's patience. Afterwards `effective` tells the truth anyway: not yet."""


class ControlApi:
    """Handlers of PUT /v1/directive and GET /v1/report."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        reporter: Reporter,
        accounting: Accounting,
        latencies: Latencies,
        certificates: Certificates,
    ) -> None:
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._accounting = accounting
        self._latencies = latencies
        self._certificates = certificates

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._operator_only])
        app.router.add_put("/v1/directive", self._put_directive)
        app.router.add_get("/v1/report", self._get_report)
        return app

    @web.middleware
    async def _operator_only(self, request: web.Request, handler: Any) -> web.StreamResponse:
        identities = peer_identities(request)
        if identities != [OPERATOR_IDENTITY]:
            log.warning("control client refused", extra={"identities": identities})
            return self._refuse(403, f"the client certificate must have the one URI name '{OPERATOR_IDENTITY}'")
        response: web.StreamResponse = await handler(request)
        return response

    async def _get_report(self, _: web.Request) -> web.Response:
        return self._report()

    async def _put_directive(self, request: web.Request) -> web.Response:
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(413, f"a directive must be at most {MAX_BODY_BYTES} bytes")
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            return self._refuse(400, "the body must be JSON")
        if not isinstance(document, dict):
            return self._refuse(400, "the body must be a JSON object")
        if document.get("version") != CONTROL_VERSION:
            return self._refuse(422, f"version must be '{CONTROL_VERSION}'")
        try:
            directive = Directive.model_validate(document)
        except ValidationError as error:
            return self._refuse(422, _explain(error))
        answer = self._dispatcher.engine_loop.apply(directive)
        if isinstance(answer, Refused):
            return self._refuse(answer.status, answer.error)
        self._accounting.follow(self._dispatcher.engine_loop.classes)
        await self._dispatcher.settled(SETTLE_S)
        return self._report(ignored=list(unknown_fields(document, Directive)))

    def _report(self, ignored: list[str] | None = None) -> web.Response:
        report = self._reporter.report(tls=self._certificates.state, ignored=ignored)
        return web.json_response(report.to_wire())

    def _refuse(self, status: int, error: str) -> web.Response:
        self._latencies.observe_refused(status)
        engine_loop = self._dispatcher.engine_loop
        log.warning("directive refused", extra={"status": status, "reason": error})
        refusal = Refusal(error=error, held=engine_loop.held(), known_points=engine_loop.engine.ladder.names)
        return web.json_response(refusal.to_wire(), status=status)


def peer_identities(request: web.Request) -> list[str]:
    """URI subject alternative names of the client's certificate."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    names = (certificate or {}).get("subjectAltName", ())
    return [value for kind, value in names if kind == "URI"]


def unknown_fields(document: dict[str, Any], model: type[Document], path: str = "") -> Iterator[str]:
    """Paths of fields that the model does not know, for example `classes[0].colour`."""
    known = {name: field.annotation for name, field in model.model_fields.items()}
    known |= {field.alias: field.annotation for field in model.model_fields.values() if field.alias}
    for name, value in document.items():
        if name not in known:
            yield f"{path}{name}"[:128]
            continue
        nested = _document_in(known[name])
        if nested and isinstance(value, dict):
            yield from unknown_fields(value, nested, f"{path}{name}.")
        elif nested and isinstance(value, list):
            for i, item in enumerate(value):
                yield from unknown_fields(item, nested, f"{path}{name}[{i}].")


def _document_in(annotation: Any) -> type[Document] | None:
    """The document type inside an annotation: itself, or a list's or optional's member."""
    if isinstance(annotation, type) and issubclass(annotation, Document):
        return annotation
    return next((found for member in get_args(annotation) if (found := _document_in(member))), None)


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    sentences = [f"{'.'.join(str(part) for part in p['loc']) or 'directive'}: {p['msg']}" for p in problems[:5]]
    return "; ".join(sentences)
