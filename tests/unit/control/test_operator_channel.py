import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from aiohttp import web

from prism_api.control import MAX_BODY_BYTES, ClassDirective, Directive, Envelope, Held, Refusal, ServiceReference
from prism_operator import pki
from prism_operator.control.certificates import client_context
from prism_operator.control.channel import Answer, Channel, Failure, Peer, Refused
from tests.unit.control.pod_server import PodServer, json_report, report

NOW = datetime.now(UTC)
PEER = Peer(namespace="team-a", service="chat", name="chat-0", uid="pod-1", ip="127.0.0.1")


@pytest.fixture(scope="module")
def authority():
    return pki.new_authority(NOW, pki.Lifetimes())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=20))


def directive(epoch=3, sequence=4):
    return Directive(
        service=ServiceReference(namespace="team-a", name="chat", uid="uid-1"),
        holder="operator",
        epoch=epoch,
        sequence=sequence,
        default_class="gold",
        classes=[ClassDirective(name="gold", ttft_ms=800, point="full", floor="full", ceiling="full")],
        envelope=Envelope(ttl_ms=30_000, safe_point="full"),
        reason="Steady",
    )


class Outcomes(list):
    """What the channel delivered, and an event for the first of it."""

    def __init__(self):
        super().__init__()
        self.first = asyncio.Event()

    def deliver(self, outcome):
        self.append(outcome)
        self.first.set()


@asynccontextmanager
async def channel_to(pod, authority, client=None):
    outcomes = Outcomes()
    channel = Channel(outcomes.deliver, port=pod.port)
    leaf = client or pki.issue_client(authority, NOW, pki.Lifetimes())
    channel.use(client_context(authority.certificate, leaf))
    try:
        yield channel, outcomes
    finally:
        await channel.close()


def test_reports_are_polled_over_one_mutually_authenticated_connection(authority, tmp_path):
    async def scenario():
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            for _ in range(5):
                await channel.poll([PEER], deadline_s=5)
            assert [type(o) for o in outcomes] == [Answer] * 5
            assert len(pod.connections) == 1

    run(scenario())


def test_a_directive_is_acknowledged_by_a_report_that_holds_its_fence(authority, tmp_path):
    async def scenario():
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            await channel.send({PEER: directive(3, 4)}, deadline_s=5)
            assert outcomes[0].acknowledges == directive(3, 4)
            assert outcomes[0].report.held.sequence == 4

    run(scenario())


def test_an_answer_that_holds_another_fence_is_no_acknowledgement(authority, tmp_path):
    async def other_fence(_):
        return json_report(held=Held(epoch=3, sequence=3))

    async def scenario():
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_directive = other_fence
            await channel.send({PEER: directive(3, 4)}, deadline_s=5)
            assert outcomes[0].reason == "Malformed"

    run(scenario())


def test_a_refusal_says_what_the_pod_holds(authority, tmp_path):
    async def refuse(_):
        return web.Response(status=409, text=Refusal(error="stale", held=Held(epoch=9)).model_dump_json(by_alias=True))

    async def scenario():
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_directive = refuse
            await channel.send({PEER: directive()}, deadline_s=5)
            assert isinstance(outcomes[0], Refused)
            assert (outcomes[0].status, outcomes[0].refusal.held.epoch) == (409, 9)

    run(scenario())


def test_a_slow_pod_costs_the_deadline_once_and_its_late_answer_is_delivered(authority, tmp_path):
    async def scenario():
        release = asyncio.Event()

        async def slow(_):
            await release.wait()
            return json_report()

        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_report = slow
            await channel.poll([PEER], deadline_s=0.05)
            await channel.poll([PEER], deadline_s=0.05)
            assert outcomes == []
            release.set()
            await outcomes.first.wait()
            assert isinstance(outcomes[0], Answer)
            assert pod.requests == 1  # it was not asked again while it was busy

    run(scenario())


async def _garbage(_):
    return web.Response(text="<html>")


async def _too_large(_):
    return web.Response(body=b"x" * (MAX_BODY_BYTES + 1))


async def _negative_counter(_):
    text = report().model_dump_json(by_alias=True).replace('"running":0', '"running":-1')
    return web.Response(text=text)


async def _other_pod(_):
    return json_report(uid="pod-2")


async def _redirect(_):
    return web.Response(status=307, headers={"Location": "https://127.0.0.1:1/steal"})


async def _server_error(_):
    return web.Response(status=500)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (_garbage, "does not parse"),
        (_too_large, "larger than"),
        (_negative_counter, "load.running"),
        (_other_pod, "pod-2"),
        (_redirect, "307"),
        (_server_error, "500"),
    ],
)
def test_a_malformed_or_lying_pod_is_a_failure_with_a_reason_and_never_a_crash(authority, tmp_path, lie, words):
    async def scenario():
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_report = lie
            await channel.poll([PEER], deadline_s=5)
            assert isinstance(outcomes[0], Failure)
            assert outcomes[0].reason == "Malformed"
            assert words in outcomes[0].message

    run(scenario())


def test_a_pod_with_the_certificate_of_another_service_is_not_talked_to(authority, tmp_path):
    async def scenario():
        sibling = PodServer(authority, tmp_path, service="mail")
        async with sibling as pod, channel_to(pod, authority) as (channel, outcomes):
            await channel.send({PEER: directive()}, deadline_s=5)
            assert outcomes[0].reason == "Unreachable"
            assert pod.requests == 0

    run(scenario())


def test_a_pod_with_a_certificate_of_a_foreign_authority_is_not_talked_to(authority, tmp_path):
    async def scenario():
        foreign = pki.new_authority(NOW, pki.Lifetimes())
        async with PodServer(foreign, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            await channel.poll([PEER], deadline_s=5)
            assert outcomes[0].reason == "Unreachable"
            assert pod.requests == 0

    run(scenario())


def test_a_service_key_cannot_be_used_as_the_operator(authority, tmp_path):
    async def scenario():
        stolen = pki.issue_server(authority, "team-a", "chat", NOW, pki.Lifetimes())
        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority, stolen) as (channel, outcomes):
            await channel.poll([PEER], deadline_s=5)
            assert outcomes[0].reason == "Unreachable"
            assert pod.requests == 0

    run(scenario())


def test_a_renewed_client_leaf_is_used_for_new_connections_and_loses_no_call(authority, tmp_path):
    async def scenario():
        release = asyncio.Event()

        async def slow(_):
            await release.wait()
            return json_report()

        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_report = slow
            await channel.poll([PEER], deadline_s=0.05)
            channel.use(client_context(authority.certificate, pki.issue_client(authority, NOW, pki.Lifetimes())))
            release.set()
            await outcomes.first.wait()
            await channel.poll([PEER], deadline_s=5)
            assert [type(o) for o in outcomes] == [Answer, Answer]
            assert len(pod.connections) == 2

    run(scenario())


def test_a_directive_breaks_off_a_poll_that_hangs(authority, tmp_path):
    async def scenario():
        async def hang(_):
            await asyncio.Event().wait()

        async with PodServer(authority, tmp_path) as pod, channel_to(pod, authority) as (channel, outcomes):
            pod.on_report = hang
            await channel.poll([PEER], deadline_s=0.05)
            await channel.send({PEER: directive()}, deadline_s=5)
            assert [o.acknowledges for o in outcomes] == [directive()]

    run(scenario())
