import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from prism_operator.control.kube import Conflict, Forbidden, Gone, Kube, KubeError, NotFound, TokenBucket
from prism_operator.control.resources import DEPLOYMENTS, PODS, PRISM_SERVICES


@asynccontextmanager
async def server(handler, **options):
    """A port whose API server is `handler`; what happened is in `requests`."""
    requests = []

    async def handle(request):
        requests.append((request.method, request.path_qs, request.headers, await request.read()))
        return await handler(request)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    configuration.api_key["BearerToken"] = "Bearer secret-token"
    kube = Kube(configuration, **options)
    try:
        yield kube, requests
    finally:
        await kube.close()
        await runner.cleanup()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=20))


def status(code, reason="", message="", causes=()):
    details = {"causes": [{"reason": cause} for cause in causes]}
    return web.json_response(
        {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}, status=code
    )


@pytest.mark.parametrize(("code", "kind"), [(403, Forbidden), (404, NotFound), (409, Conflict), (410, Gone)])
def test_a_refusal_is_an_exception_of_its_kind_that_names_verb_path_and_message(code, kind):
    async def refuse(_):
        return status(code, "Some", "the server's sentence")

    async def scenario():
        async with server(refuse) as (kube, requests):
            with pytest.raises(kind, match=r"get /apis/apps/v1/namespaces/a/deployments/b: .* the server's sentence"):
                await kube.get(DEPLOYMENTS, "a", "b")
            assert len(requests) == 1

    run(scenario())


def test_a_terminating_namespace_is_told_from_a_missing_right():
    async def refuse(_):
        return status(403, "Forbidden", "terminating", ["NamespaceTerminating"])

    async def scenario():
        async with server(refuse) as (kube, _):
            with pytest.raises(Forbidden) as refused:
                await kube.get(DEPLOYMENTS, "a", "b")
            assert refused.value.namespace_terminating

    run(scenario())


def test_a_server_that_asks_to_wait_is_obeyed_and_asked_again():
    answers = [429, 503, 200]

    async def busy(_):
        code = answers.pop(0)
        return web.Response(status=code, headers={"Retry-After": "0.05"}, text="{}" if code == 200 else "busy")

    async def scenario():
        async with server(busy) as (kube, requests):
            started_s = time.monotonic()
            assert await kube.get(PODS, "a", "b") == {}
            assert time.monotonic() - started_s >= 0.1
            assert len(requests) == 3

    run(scenario())


def test_a_server_that_stays_broken_is_given_up_after_four_tries():
    async def broken(_):
        return web.Response(status=500, headers={"Retry-After": "0"}, text="<html>a proxy's page</html>")

    async def scenario():
        async with server(broken) as (kube, requests):
            with pytest.raises(KubeError, match="a proxy's page"):
                await kube.get(PODS, "a", "b")
            assert len(requests) == 4

    run(scenario())


def test_apply_sends_the_whole_intent_under_our_field_manager_and_the_token():
    async def accept(request):
        return web.json_response({"kind": "Deployment"})

    async def scenario():
        intent = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"namespace": "a", "name": "b"},
            "spec": {"replicas": 2},
        }
        async with server(accept) as (kube, requests):
            await kube.apply(intent, force=True)
            method, path, headers, body = requests[0]
            assert (method, path) == (
                "PATCH",
                "/apis/apps/v1/namespaces/a/deployments/b?fieldManager=prism-operator&force=true",
            )
            assert headers["Content-Type"] == "application/apply-patch+yaml"
            assert headers["Authorization"] == "Bearer secret-token"
            assert json.loads(body) == intent

    run(scenario())


def test_pages_are_followed_to_the_end():
    async def pages(request):
        if request.query.get("continue") == "next":
            return web.json_response({"metadata": {"resourceVersion": "9"}, "items": [{"n": 3}]})
        return web.json_response(
            {"metadata": {"resourceVersion": "9", "continue": "next"}, "items": [{"n": 1}, {"n": 2}]}
        )

    async def scenario():
        async with server(pages) as (kube, _):
            seen = [
                (item["n"], version) async for items, version in kube.list_pages(PRISM_SERVICES, None) for item in items
            ]
            assert seen == [(1, "9"), (2, "9"), (3, "9")]

    run(scenario())


def test_a_watch_yields_events_of_any_size_and_turns_an_expired_version_into_gone():
    large = "x" * 300_000  # beyond the HTTP reader's own limit for a line

    async def stream(request):
        answer = web.StreamResponse()
        await answer.prepare(request)
        first = json.dumps({"type": "ADDED", "object": {"metadata": {"resourceVersion": "2"}, "data": large}})
        await answer.write(first[:1000].encode())
        await answer.write((first[1000:] + "\n").encode())
        error = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}
        await answer.write((json.dumps(error) + "\n").encode())
        return answer

    async def scenario():
        async with server(stream) as (kube, requests):
            events = []

            async def follow():
                async for kind, obj in kube.watch(PODS, None, "1", "a=b"):
                    events.append((kind, len(obj["data"])))

            with pytest.raises(Gone):
                await follow()
            assert events == [("ADDED", 300_000)]
            assert "allowWatchBookmarks=true" in requests[0][1]

    run(scenario())


def test_events_are_dropped_first_when_writes_are_throttled():
    async def accept(_):
        return web.json_response({}, status=201)

    async def scenario():
        async with server(accept, writes_per_s=0.001, write_burst=1) as (kube, requests):
            event = {"metadata": {"namespace": "a", "name": "e"}}
            assert await kube.create_event(event)
            assert not await kube.create_event(event)
            assert len(requests) == 1

    run(scenario())


def test_the_bucket_allows_a_burst_and_then_its_rate():
    now_s = [0.0]
    bucket = TokenBucket(rate_per_s=2.0, burst=3, clock=lambda: now_s[0])
    assert [bucket.try_take() for _ in range(4)] == [True, True, True, False]
    now_s[0] = 0.5
    assert [bucket.try_take() for _ in range(2)] == [True, False]
