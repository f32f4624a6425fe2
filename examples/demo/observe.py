"""Watches a PrismService from outside: replicas and pods from the API server, each pod's /metrics through its proxy.

Everything goes through one address, that of `kubectl proxy`, so it works on any cluster that kubectl reaches.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from examples.demo.records import PodSample, Sample

METRICS_PORT, OPERATOR_METRICS_PORT = 8082, 9090
TIMEOUT = aiohttp.ClientTimeout(total=3)
ENDED = ("Succeeded", "Failed")
WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
BUSY, LAG = "prism_runtime_busy_seconds_total", "prism_runtime_lag_seconds_total"
ACK_BUCKETS = "prism_operator_directive_ack_seconds_bucket"

Histogram = dict[float, float]
"""Cumulative counts by upper bound, as Prometheus has them."""


def pod_sample(page: str) -> PodSample:
    """What one runtime pod's metrics page says."""
    points: dict[str, str] = {}
    tokens: dict[str, int] = {}
    values = dict.fromkeys((WAITING, RUNNING, BUSY, LAG), 0.0)
    for name, labels, value in _series(page):
        if name == "prism_runtime_operating_point" and value == 1:
            points[labels["class"]] = labels["point"]
        elif name == "prism_runtime_tokens_total":
            tokens[labels["point"]] = tokens.get(labels["point"], 0) + int(value)
        elif name in values:
            values[name] = value
    return PodSample(points, int(values[WAITING]), int(values[RUNNING]), tokens, values[BUSY], values[LAG])


def ack_buckets(page: str) -> Histogram:
    """The histogram of directive acknowledgements on an operator's metrics page."""
    return {float(labels["le"]): value for name, labels, value in _series(page) if name == ACK_BUCKETS}


def _series(page: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


class Observer:
    """One service, seen through a session whose every request reaches a kubectl proxy or an API server at `api`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        namespace: str,
        service: str,
        operator_namespace: str,
        api: str = "http://localhost",
    ) -> None:
        self._session, self._api = session, api
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._deployment = f"/apis/apps/v1/namespaces/{namespace}/deployments/{service}"
        self._resource = f"/apis/moeprism.io/v1alpha1/namespaces/{namespace}/prismservices/{service}"
        self._selector = f"labelSelector=moeprism.io/service={service}"
        self._operators = f"/api/v1/namespaces/{operator_namespace}/pods"

    async def resource(self) -> dict[str, Any]:
        """The PrismService as it is now."""
        return await self._json(self._resource)

    async def sample(self) -> Sample:
        """One look. A pod that does not answer is missing from `pods`, not from the counts.

        Raises aiohttp.ClientError or TimeoutError if the API server does not answer.
        """
        deployment, pods = await asyncio.gather(
            self._json(self._deployment), self._json(f"{self._pods}?{self._selector}")
        )
        alive = [pod for pod in pods["items"] if pod["status"].get("phase") not in ENDED]
        ready = [pod["metadata"]["name"] for pod in alive if _is_ready(pod)]
        seen = await asyncio.gather(*(self._page(f"{self._pods}/{name}:{METRICS_PORT}") for name in ready))
        return Sample(
            at_s=time.monotonic(),
            desired=deployment["spec"]["replicas"],
            ready=len(ready),
            existing=len(alive),
            pods={name: pod_sample(page) for name, page in zip(ready, seen, strict=True) if page is not None},
        )

    async def acknowledgements(self) -> Histogram:
        """Directive acknowledgements so far, summed over the operator's pods that answer."""
        pods = await self._json(f"{self._operators}?labelSelector=app.kubernetes.io/name=prism-operator")
        names = [pod["metadata"]["name"] for pod in pods["items"]]
        pages = await asyncio.gather(*(self._page(f"{self._operators}/{n}:{OPERATOR_METRICS_PORT}") for n in names))
        total: Histogram = {}
        for page in pages:
            for bound, count in ack_buckets(page or "").items():
                total[bound] = total.get(bound, 0) + count
        return total

    async def watch(self, period_s: float, see: Callable[[Sample], None]) -> None:
        """Sample for ever, at whole periods; a look that fails is left out, and the next one comes in time."""
        due_s = time.monotonic()
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                see(await self.sample())
            due_s = max(due_s + period_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    async def _json(self, path: str) -> dict[str, Any]:
        async with self._session.get(self._api + path, timeout=TIMEOUT) as response:
            response.raise_for_status()
            document: dict[str, Any] = await response.json()
            return document

    async def _page(self, pod: str) -> str | None:
        try:
            async with self._session.get(f"{self._api}{pod}/proxy/metrics", timeout=TIMEOUT) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def _is_ready(pod: dict[str, Any]) -> bool:
    """Ready and not told to end: a pod that drains still answers, but it is no capacity any more."""
    conditions = pod["status"].get("conditions", ())
    told = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return told and "deletionTimestamp" not in pod["metadata"]
