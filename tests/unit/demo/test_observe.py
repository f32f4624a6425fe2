"""What the observer reads from metrics pages, and what it does when some do not answer."""

import asyncio

import pytest
from aiohttp import ClientSession, web

from examples.demo.observe import Observer, ack_buckets, pod_sample
from examples.demo.records import Sample, as_line, on_clock_of, sample_from

PAGE = """
# TYPE prism_runtime_operating_point gauge
prism_runtime_operating_point{class="interactive",point="b750"} 1.0
prism_runtime_operating_point{class="batch",point="b500"} 1.0
# TYPE prism_runtime_tokens counter
prism_runtime_tokens_total{class="interactive",point="b750"} 12.0
prism_runtime_tokens_total{class="batch",point="b750"} 3.0
prism_runtime_tokens_total{class="interactive",point="full"} 40.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="small-moe"} 4.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="small-moe"} 9.0
# TYPE prism_runtime_busy_seconds counter
prism_runtime_busy_seconds_total 20.5
# TYPE prism_runtime_lag_seconds counter
prism_runtime_lag_seconds_total 1.5
"""
ACKS = """
# TYPE prism_operator_directive_ack_seconds histogram
prism_operator_directive_ack_seconds_bucket{le="0.005"} 7.0
prism_operator_directive_ack_seconds_bucket{le="+Inf"} 8.0
prism_operator_directive_ack_seconds_sum 0.1
prism_operator_directive_ack_seconds_count 8.0
"""


def _pod(name: str, *, ready: bool = True, phase: str = "Running", deleting: bool = False) -> dict:
    metadata = {"name": name} | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleting else {})
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {"metadata": metadata, "status": {"phase": phase, "conditions": conditions}}


PODS = [
    _pod("serving"),
    _pod("mute"),
    _pod("starting", ready=False),
    _pod("draining", deleting=True),
    _pod("evicted", ready=False, phase="Failed"),
]


def _observed() -> tuple[Sample, dict[float, float]]:
    async def pods(_: web.Request) -> web.Response:
        return web.json_response({"items": PODS})

    async def deployment(_: web.Request) -> web.Response:
        return web.json_response({"spec": {"replicas": 3}})

    async def metrics(request: web.Request) -> web.Response:
        pages = {"serving:8082": PAGE, "serving:9090": ACKS}
        page = pages.get(request.match_info["pod"])
        return web.Response(text=page) if page else web.Response(status=503)

    async def look() -> tuple[Sample, dict[float, float]]:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/{namespace}/pods", pods)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}/proxy/metrics", metrics)
        app.router.add_get("/apis/apps/v1/namespaces/demo/deployments/chat", deployment)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with ClientSession() as session:
                api = f"http://127.0.0.1:{runner.addresses[0][1]}"
                names = {"namespace": "demo", "service": "chat", "operator_namespace": "prism-system"}
                observer = Observer(session, **names, api=api)
                return await observer.sample(), await observer.acknowledgements()
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(look(), 20))


def test_a_page_tells_points_by_class_load_and_tokens_by_point() -> None:
    seen = pod_sample(PAGE)
    assert seen.points == {"interactive": "b750", "batch": "b500"}
    assert seen.tokens_by_point == {"b750": 15, "full": 40}
    assert (seen.waiting, seen.running) == (4, 9)
    assert (seen.busy_s, seen.lag_s) == (20.5, 1.5)


def test_every_pod_that_holds_an_accelerator_exists_but_only_serving_ones_are_ready() -> None:
    seen, _ = _observed()
    assert (seen.existing, seen.ready, seen.desired) == (4, 2, 3)


def test_a_pod_that_does_not_answer_is_missing_from_the_pods_not_from_the_count() -> None:
    seen, _ = _observed()
    assert list(seen.pods) == ["serving"]


def test_acknowledgements_are_summed_over_the_operators_that_answer() -> None:
    _, acks = _observed()
    assert acks == ack_buckets(ACKS) == {0.005: 7.0, float("inf"): 8.0}


def test_a_sample_survives_its_line_and_moves_to_the_replays_clock() -> None:
    import json

    seen, _ = _observed()
    again = sample_from(json.loads(as_line(seen)))
    assert again == seen
    (moved,) = on_clock_of([seen], seen.at_s - 2.5)
    assert moved.at_s == pytest.approx(2.5)
