"""The port to the API server: the only module that talks to it, and the list of what it may do.

Plain dicts in and out. Requests go through aiohttp directly; the `kubernetes` package only loads the kubeconfig or the
in-cluster configuration and re-reads the rotating ServiceAccount token. Its request layer is not used because it hides
what we need to decide ourselves: how long a watch may be silent, what Retry-After means, when a write waits.

Rights used. Scope `own`: the operator's namespace. Scope `tenant`: every namespace that lets the operator in; nothing
beyond them can be read. Scope `watched`: cluster-wide when all namespaces are watched, else the watched ones. A
server-side apply needs `patch`, and `create` where the object does not exist yet.

| group | resource | verbs | scope |
| --- | --- | --- | --- |
| moeprism.io | prismservices | get, list, watch | watched |
| moeprism.io | prismservices/status | patch | watched |
| moeprism.io | prismmodels | get, list, watch | watched |
| moeprism.io | prismmodels/status | patch | watched |
| core | pods | list, watch, patch | tenant |
| apps | deployments | get, list, watch, create, patch | tenant |
| events.k8s.io | events | create | tenant |
| core | services | get, create, patch | tenant |
| core | secrets | get, create, patch | tenant |
| policy | poddisruptionbudgets | get, create, patch, delete | tenant |
| networking.k8s.io | networkpolicies | get, create, patch, delete | tenant |
| core | secrets | get, create | own |
| coordination.k8s.io | leases | get, create, update | own |
| apiextensions.k8s.io | customresourcedefinitions | get | cluster |
"""

import asyncio
import json
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import Configuration

from prism_operator import metrics
from prism_operator.control.resources import EVENTS, Object, Resource, resource_of

FIELD_MANAGER = "prism-operator"
CALL_TIMEOUT_S = 10.0
PAGE_SIZE = 500
WATCH_SERVER_TIMEOUT_S = 290
WATCH_INACTIVITY_S = 70.0
"""A watch with bookmarks is never silent for longer than about a minute; a silent one is a dead connection."""


class NoAccess(Exception):
    """No usable kubeconfig and no ServiceAccount: it is not known where the API server is."""


class KubeError(Exception):
    """The API server refused, failed or did not answer (status 0). The message names verb, path and answer."""

    def __init__(self, verb: str, path: str, status: int, reason: str, message: str, causes: frozenset[str]) -> None:
        super().__init__(f"{verb} {path}: {status or 'no answer'} {reason} {message}".strip())
        self.verb, self.path, self.status, self.reason, self.message = verb, path, status, reason, message
        self.causes = causes
        """Machine-readable causes of the Status object, for example `NamespaceTerminating`."""


class NotFound(KubeError):
    """404: the object does not exist."""


class Conflict(KubeError):
    """409: it exists already, its resourceVersion moved on, or another manager owns the field."""


class Forbidden(KubeError):
    """403: a right of this module's table is missing, or the namespace is terminating (see `causes`)."""

    @property
    def namespace_terminating(self) -> bool:
        return "NamespaceTerminating" in self.causes


class Gone(KubeError):
    """410: the resourceVersion is too old to watch from; list again."""


_BY_STATUS = {403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone}


def error_of(verb: str, path: str, status: int, body: bytes) -> KubeError:
    """The exception for an answer that is not a success; the body is a Status object, or anything a proxy made up."""
    try:
        parsed = json.loads(body)
        answer = parsed if isinstance(parsed, dict) else {}
    except ValueError:
        answer = {}
    details = answer.get("details") or {}
    causes = frozenset(str(c.get("reason")) for c in details.get("causes") or [])
    message = str(answer.get("message") or body[:200].decode(errors="replace"))
    return _BY_STATUS.get(status, KubeError)(verb, path, status, str(answer.get("reason") or ""), message, causes)


class TokenBucket:
    """Client-side limit of writes: `rate_per_s` in the long run, `burst` at once."""

    def __init__(self, rate_per_s: float, burst: int, clock: Any = time.monotonic) -> None:
        self._rate_per_s, self._burst, self._clock = rate_per_s, burst, clock
        self._tokens, self._at_s = float(burst), clock()

    def _refill(self) -> None:
        now_s = self._clock()
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s

    def try_take(self) -> bool:
        """Take a token if one is there; never waits."""
        self._refill()
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    async def take(self) -> None:
        """Take a token; the bucket goes into debt, so that waiters are served in order and each waits its own turn."""
        self._refill()
        self._tokens -= 1
        if self._tokens < 0:
            wait_s = -self._tokens / self._rate_per_s
            metrics.API_THROTTLE.inc(wait_s)
            await asyncio.sleep(wait_s)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the API server is and how to be trusted by it; for clients other than this port."""

    server: str
    ca_path: str | None
    certificate_path: str | None
    private_key_path: str | None
    token: str | None
    insecure: bool


class Kube:
    """Calls to the API server on plain dicts. Build it with `connect`; close it after use."""

    def __init__(self, configuration: Configuration, *, writes_per_s: float = 20.0, write_burst: int = 50) -> None:
        self._configuration = configuration
        self._bucket = TokenBucket(writes_per_s, write_burst)
        self._server = configuration.host.rstrip("/")
        tls, headers = _ssl_context(configuration), {"User-Agent": FIELD_MANAGER, "Accept": "application/json"}
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64, ssl=tls), headers=headers)
        # a watch holds its connection for minutes: with a common limit, many watches would leave none for calls
        self._watches = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=tls), headers=headers)

    @classmethod
    async def connect(cls, kubeconfig: str | None = None) -> Self:
        """By the kubeconfig given, else KUBECONFIG, else the pod's ServiceAccount. Raises NoAccess."""
        configuration = Configuration()
        path = kubeconfig or os.environ.get("KUBECONFIG")
        try:
            if path:
                await kube_config.load_kube_config(config_file=path, client_configuration=configuration)
            else:
                kube_config.load_incluster_config(client_configuration=configuration)
        except (kube_config.ConfigException, OSError, ValueError) as error:
            where = f"kubeconfig '{path}'" if path else "the pod's ServiceAccount"
            raise NoAccess(
                f"No access to an API server by {where}: {error}. Set --kubeconfig or KUBECONFIG."
            ) from error
        return cls(configuration)

    async def close(self) -> None:
        await self._session.close()
        await self._watches.close()

    async def connection(self) -> Connection:
        """The same access for another client, with the token as it is now."""
        c = self._configuration
        token = await self._token()
        return Connection(
            server=c.host,
            ca_path=c.ssl_ca_cert,
            certificate_path=c.cert_file,
            private_key_path=c.key_file,
            token=token.partition(" ")[2] if token else None,
            insecure=not c.verify_ssl,
        )

    async def get(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        attempts: int = 4,
    ) -> Object:
        """Raises NotFound."""
        return await self._call("get", "GET", resource.path(namespace, name), timeout_s=timeout_s, attempts=attempts)

    async def discover(self, api_version: str) -> list[str]:
        """Plural names of the resources that the server serves under an API version. Raises NotFound."""
        answer = await self._call("get", "GET", f"/apis/{api_version}")
        return [resource["name"] for resource in answer.get("resources", [])]

    async def list_pages(
        self, resource: Resource, namespace: str | None, label_selector: str = ""
    ) -> AsyncIterator[tuple[list[Object], str]]:
        """Pages of (items, resourceVersion of the list). Raises Gone when the snapshot expires between two pages."""
        query: dict[str, str] = {"limit": str(PAGE_SIZE), "labelSelector": label_selector}
        while True:
            page = await self._call("list", "GET", resource.path(namespace), query=query)
            metadata = page.get("metadata", {})
            yield page.get("items") or [], metadata.get("resourceVersion", "")
            token = metadata.get("continue")
            if not token:
                return
            query["continue"] = token

    async def watch(
        self, resource: Resource, namespace: str | None, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[tuple[str, Object]]:
        """(type, object) of each event, bookmarks included; ends when the server ends the watch.

        Raises Gone when the version is too old, KubeError when the connection breaks or is silent for too long.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SERVER_TIMEOUT_S),
            "labelSelector": label_selector,
        }
        path = resource.path(namespace)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S, sock_read=WATCH_INACTIVITY_S)
        try:
            async with self._watches.get(
                self._server + path, params=query, headers=await self._headers(), timeout=timeout
            ) as answer:
                metrics.API_REQUESTS.labels("watch", str(answer.status)).inc()
                if answer.status != 200:
                    raise error_of("watch", path, answer.status, await answer.read())
                async for line in _lines(answer.content):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise error_of("watch", path, int(status.get("code", 500)), json.dumps(status).encode())
                    yield event["type"], event["object"]
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            metrics.API_REQUESTS.labels("watch", "0").inc()
            raise KubeError("watch", path, 0, "", f"{type(error).__name__}: {error}", frozenset()) from error

    async def apply(self, obj: Object, *, force: bool) -> Object:
        """Server-side apply of the complete intent. `force` only on objects that are known to be ours."""
        resource = resource_of(obj)
        path = resource.path(obj["metadata"].get("namespace"), obj["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true" if force else "false"}
        return await self._call(
            "apply", "PATCH", path, query=query, body=obj, content_type="application/apply-patch+yaml"
        )

    async def create_or_conflict(self, obj: Object) -> Object:
        """Create. Raises Conflict when it exists already."""
        path = resource_of(obj).path(obj["metadata"].get("namespace"))
        return await self._call("create", "POST", path, body=obj, query={"fieldManager": FIELD_MANAGER})

    async def replace_if(self, obj: Object, *, timeout_s: float = CALL_TIMEOUT_S, attempts: int = 1) -> Object:
        """Compare-and-swap on the object's metadata.resourceVersion. Raises Conflict when it moved on."""
        assert obj["metadata"].get("resourceVersion"), "a replace without resourceVersion would overwrite blindly"
        path = resource_of(obj).path(obj["metadata"].get("namespace"), obj["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER}
        return await self._call(
            "update", "PUT", path, body=obj, query=query, timeout_s=timeout_s, attempts=attempts, throttled=False
        )

    async def patch_status(self, resource: Resource, namespace: str, name: str, status: Object) -> Object:
        """Merge patch of the status subresource; keys with value None are removed. Raises NotFound."""
        path = resource.path(namespace, name, "status")
        query = {"fieldManager": FIELD_MANAGER}
        body = {"status": status}
        return await self._call(
            "patch", "PATCH", path, query=query, body=body, content_type="application/merge-patch+json"
        )

    async def patch(self, resource: Resource, namespace: str, name: str, change: Object) -> Object:
        """Merge patch; keys of value None are removed. Raises NotFound, and Conflict if `change` names another uid."""
        path, query = resource.path(namespace, name), {"fieldManager": FIELD_MANAGER}
        return await self._call(
            "patch", "PATCH", path, query=query, body=change, content_type="application/merge-patch+json"
        )

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Delete that very object (uid precondition); gone already is success."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        try:
            await self._call("delete", "DELETE", resource.path(namespace, name), body=body)
        except NotFound:
            return

    async def create_event(self, event: Object) -> bool:
        """Create an Event unless writes are throttled; False if it was dropped. Never retried."""
        if not self._bucket.try_take():
            metrics.EVENTS_DROPPED.inc()
            return False
        path = EVENTS.path(event["metadata"]["namespace"])
        await self._call("create", "POST", path, body=event, attempts=1, throttled=False)
        return True

    async def _token(self) -> str | None:
        token: str | None = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return token

    async def _headers(self, content_type: str | None = None) -> dict[str, str]:
        headers = {"Content-Type": content_type} if content_type else {}
        if token := await self._token():
            headers["Authorization"] = token
        return headers

    async def _call(
        self,
        verb: str,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        timeout_s: float = CALL_TIMEOUT_S,
        attempts: int = 4,
        throttled: bool = True,
    ) -> Object:
        """One request; 429, 5xx and broken connections are tried again, because every call here is idempotent."""
        if throttled and method != "GET":
            await self._bucket.take()
        data = None if body is None else json.dumps(body).encode()
        attempt = 0
        while True:
            attempt += 1
            retry_after_s: float | None = None
            try:
                async with self._session.request(
                    method,
                    self._server + path,
                    params=query,
                    data=data,
                    headers=await self._headers(content_type if data else None),
                    timeout=aiohttp.ClientTimeout(total=timeout_s),
                ) as answer:
                    metrics.API_REQUESTS.labels(verb, str(answer.status)).inc()
                    payload = await answer.read()
                    if answer.status < 300:
                        result: Object = json.loads(payload) if payload else {}
                        return result
                    failure = error_of(verb, path, answer.status, payload)
                    retry_after_s = _seconds(answer.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                metrics.API_REQUESTS.labels(verb, "0").inc()
                failure = KubeError(verb, path, 0, "", f"{type(error).__name__}: {error}", frozenset())
            retriable = failure.status in (0, 429) or failure.status >= 500
            if not retriable or attempt >= attempts:
                raise failure
            wait_s = (0.2 * 2**attempt if retry_after_s is None else retry_after_s) * random.uniform(1.0, 1.5)
            metrics.API_THROTTLE.inc(wait_s)
            await asyncio.sleep(wait_s)


def _seconds(header: str | None) -> float | None:
    try:
        return min(60.0, max(0.0, float(header))) if header is not None else None
    except ValueError:  # a date: allowed by HTTP, not sent by the API server
        return None


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length; the reader's own line iterator refuses objects above its buffer limit."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line


def _ssl_context(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
