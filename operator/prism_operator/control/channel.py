"""The control channel: reports from pods, directives to pods, over mTLS, one keep-alive connection per pod.

Nothing here waits for a slow pod: a call to a pod runs as a task of its own, a poll waits until its deadline and
returns, and an answer is delivered when it comes, in time or late. One call per pod is under way at most. Whatever a
pod answers, it cannot harm the operator: bodies are bounded and validated, and what is wrong becomes a `Failure`.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from pydantic import ValidationError

from prism_api.control import MAX_BODY_BYTES, Directive, Refusal, Report, server_name
from prism_operator import metrics

CONTROL_PORT = 8081
CALL_TIMEOUT_S = 2.0
KEEP_ALIVE_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod that can be called."""

    namespace: str
    service: str
    name: str
    uid: str
    ip: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A valid report; `acknowledges` is the directive that it accepted, None for a poll."""

    peer: Peer
    report: Report
    received_s: float
    acknowledges: Directive | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The pod refused a directive and said why and what it holds."""

    peer: Peer
    directive: Directive
    status: int
    refusal: Refusal
    received_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """No usable answer. `reason` is `Unreachable` or `Malformed`."""

    peer: Peer
    reason: str
    message: str
    received_s: float


Outcome = Answer | Refused | Failure


class Malformed(Exception):
    """The pod answered with something that is not what the control API promises."""


class Channel:
    """Calls pods. `deliver` gets every outcome, in the event loop, as soon as it is there."""

    def __init__(
        self,
        deliver: Callable[[Outcome], None],
        *,
        port: int = CONTROL_PORT,
        call_timeout_s: float = CALL_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliver, self._port, self._call_timeout_s, self._clock = deliver, port, call_timeout_s, clock
        self._session: aiohttp.ClientSession | None = None
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._answering: set[str] = set()
        metrics.CHANNEL_PODS.set_function(lambda: len(self._answering))
        self._closing: set[asyncio.Task[None]] = set()

    def use(self, context: ssl.SSLContext) -> None:
        """Make new connections with this TLS context; calls under way end on the old one."""
        old, self._session = (
            self._session,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=context, limit=0, limit_per_host=1, keepalive_timeout=KEEP_ALIVE_S, use_dns_cache=False
                ),
                timeout=aiohttp.ClientTimeout(total=self._call_timeout_s),
            ),
        )
        if old is not None:
            task = asyncio.create_task(self._close_when_quiet(old, list(self._calls.values())))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Break off everything."""
        for task in [*self._calls.values(), *self._closing]:
            task.cancel()
        await asyncio.gather(*self._calls.values(), *self._closing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def poll(self, peers: Iterable[Peer], deadline_s: float) -> None:
        """Ask pods for their report and wait for them, but no longer than the deadline. A pod that is still busy with
        the last call is not asked again."""
        await self._gather([(peer, self._get(peer)) for peer in peers if peer.uid not in self._calls], deadline_s)

    async def send(self, directives: Mapping[Peer, Directive], deadline_s: float) -> None:
        """Send each pod its directive and wait for acknowledgements, but no longer than the deadline.

        A directive outranks a poll: a call under way to the same pod is broken off.
        """
        for peer in directives:
            if call := self._calls.pop(peer.uid, None):
                call.cancel()
        await self._gather([(peer, self._put(peer, directive)) for peer, directive in directives.items()], deadline_s)

    def forget(self, pod_uid: str) -> None:
        """The pod is gone; its idle connection is closed by the connector."""
        self._answering.discard(pod_uid)
        if call := self._calls.pop(pod_uid, None):
            call.cancel()

    async def _gather(self, calls: list[tuple[Peer, Coroutine[Any, Any, Outcome]]], deadline_s: float) -> None:
        tasks = [self._start(peer, call) for peer, call in calls]
        if tasks:
            await asyncio.wait(tasks, timeout=deadline_s)

    def _start(self, peer: Peer, call: Coroutine[Any, Any, Outcome]) -> asyncio.Task[None]:
        async def run() -> None:
            outcome = await call
            self._calls.pop(peer.uid, None)
            (self._answering.discard if isinstance(outcome, Failure) else self._answering.add)(peer.uid)
            self._deliver(outcome)

        task = asyncio.create_task(run(), name=f"call {peer.namespace}/{peer.name}")
        self._calls[peer.uid] = task
        return task

    async def _get(self, peer: Peer) -> Outcome:
        started_s = self._clock()
        try:
            status, body = await self._request(peer, "GET", "/v1/report", None)
            if status != 200:
                raise Malformed(f"GET /v1/report answered {status}")
            report = _report(peer, body)
        except (Malformed, aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._failure(peer, error)
        received_s = self._clock()
        metrics.CHANNEL_POLL_DURATION.observe(received_s - started_s)
        return Answer(peer, report, received_s)

    async def _put(self, peer: Peer, directive: Directive) -> Outcome:
        started_s = self._clock()
        try:
            body = directive.model_dump_json(by_alias=True, exclude_none=True).encode()
            status, answer = await self._request(peer, "PUT", "/v1/directive", body)
            if status == 200:
                report = _report(peer, answer)
                if report.held.fence != directive.fence:
                    raise Malformed(f"acknowledged {directive.fence} but holds {report.held.fence}")
                received_s = self._clock()
                metrics.DIRECTIVES.labels("Acked").inc()
                metrics.DIRECTIVE_ACK.observe(received_s - started_s)
                return Answer(peer, report, received_s, acknowledges=directive)
            if status not in (403, 409, 412, 413, 422):
                raise Malformed(f"PUT /v1/directive answered {status}")
            refusal = Refusal.model_validate_json(answer)
        except ValidationError as error:
            return self._failure(peer, Malformed(f"refusal does not parse: {error.errors()[0]['msg']}"), sent=True)
        except (Malformed, aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._failure(peer, error, sent=True)
        metrics.DIRECTIVES.labels("Refused").inc()
        return Refused(peer, directive, status, refusal, self._clock())

    def _failure(self, peer: Peer, error: Exception, *, sent: bool = False) -> Failure:
        reason = "Malformed" if isinstance(error, Malformed) else "Unreachable"
        if sent:
            metrics.DIRECTIVES.labels(reason).inc()
        return Failure(peer, reason, str(error) or type(error).__name__, self._clock())

    async def _request(self, peer: Peer, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        assert self._session is not None, "use() gives the channel a TLS context before the first call"
        host = f"[{peer.ip}]" if ":" in peer.ip else peer.ip
        async with self._session.request(
            method,
            f"https://{host}:{self._port}{path}",
            data=body,
            headers={"Content-Type": "application/json"} if body else None,
            server_hostname=server_name(peer.namespace, peer.service),
            allow_redirects=False,  # a pod must not send the operator, and its certificate, elsewhere
        ) as answer:
            content = bytearray()
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > MAX_BODY_BYTES:
                    raise Malformed(f"answer is larger than {MAX_BODY_BYTES} bytes")
            return answer.status, bytes(content)

    @staticmethod
    async def _close_when_quiet(session: aiohttp.ClientSession, calls: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*calls, return_exceptions=True)
        await session.close()


def _report(peer: Peer, body: bytes) -> Report:
    """The body as a report of that very pod. Raises Malformed."""
    try:
        report = Report.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Malformed(f"report does not parse: {where}: {first['msg']}") from None
    if report.pod.uid != peer.uid:
        raise Malformed(f"answers as pod '{report.pod.name}' with uid '{report.pod.uid}', expected '{peer.uid}'")
    return report
