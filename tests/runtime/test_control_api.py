"""The control API's contract, line by line, over real mutual TLS on 127.0.0.1."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prism_api.control import MAX_BODY_BYTES, OPERATOR_IDENTITY, Refusal, Report
from tests.runtime.serving.authority import SERVER_NAME, SERVER_URI, Authority, anonymous
from tests.runtime.serving.engine import ScriptedEngine
from tests.runtime.serving.process import DIGEST, SERVICE_UID, Served, serving, until


@dataclass
class Operator:
    """A client of one pod's control port."""

    served: Served
    context: ssl.SSLContext

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        url = f"https://127.0.0.1:{self.served.ports['control_port']}{path}"
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.context)) as http,
            http.request(
                method, url, server_hostname=SERVER_NAME, timeout=aiohttp.ClientTimeout(total=5), **options
            ) as response,
        ):
            return response.status, await response.json()

    async def put(self, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return await self.call("PUT", "/v1/directive", json=document)

    async def report(self) -> Report:
        status, document = await self.call("GET", "/v1/report")
        assert status == 200
        return Report.model_validate(document)


def make_class(**changes: Any) -> dict[str, Any]:
    ordered = {"name": "gold", "ttftMs": 5000, "tpotMs": 1000, "point": "full", "floor": "b500", "ceiling": "full"}
    return ordered | changes


def make_directive(epoch: int = 1, sequence: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "version": "control.v1",
        "service": {"namespace": "team-a", "name": "chat", "uid": SERVICE_UID},
        "modelDigest": DIGEST,
        "holder": "operator-1",
        "epoch": epoch,
        "sequence": sequence,
        "defaultClass": "gold",
        "classes": [make_class()],
        "envelope": {"ttlMs": 30000, "safePoint": "full"},
        "reason": "Test",
    } | changes


@asynccontextmanager
async def pod(folder: Path, engine: ScriptedEngine | None = None, **settings: Any) -> AsyncIterator[Operator]:
    authority = Authority()
    authority.write_server(folder / "tls")
    context = authority.client(folder / "operator")
    async with serving(
        engine or ScriptedEngine(), tls_dir=folder / "tls", service_uid=SERVICE_UID, **settings
    ) as served:
        operator = Operator(served, context)
        await wait_open(operator)
        yield operator


async def wait_open(operator: Operator) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await operator.report()
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)
            else:
                return


# -- who may speak --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["no certificate", "foreign authority"])
def test_client_without_a_certificate_of_our_authority_is_refused_in_the_handshake(tmp_path: Path, who: str) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            trust = (tmp_path / "tls" / "ca.crt").read_bytes()
            stranger = Authority("foreign").client(tmp_path / "foreign", trust=trust)
            context = anonymous(trust) if who == "no certificate" else stranger
            with pytest.raises(aiohttp.ClientError):
                await Operator(operator.served, context).put(make_directive())
            assert (await operator.report()).held.epoch == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("uris", [(SERVER_URI,), (OPERATOR_IDENTITY + "x",), (OPERATOR_IDENTITY, SERVER_URI)])
def test_right_authority_with_another_identity_is_refused_with_403_and_state_is_unchanged(
    tmp_path: Path, uris: tuple[str, ...]
) -> None:
    async def scenario() -> None:
        authority = Authority()
        authority.write_server(tmp_path / "tls")
        async with serving(ScriptedEngine(), tls_dir=tmp_path / "tls") as served:
            operator = Operator(served, authority.client(tmp_path / "operator"))
            await wait_open(operator)
            sibling = Operator(served, authority.client(tmp_path / "sibling", *uris))
            for answer in (await sibling.put(make_directive()), await sibling.call("GET", "/v1/report")):
                assert answer[0] == 403
                assert OPERATOR_IDENTITY in answer[1]["error"]
            assert (await operator.report()).held.state == "Unmanaged"

    asyncio.run(scenario())


def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            operator.context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(aiohttp.ClientError):
                await operator.report()

    asyncio.run(scenario())


def test_service_port_speaks_no_control_api(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            response = await operator.served.http.put(operator.served.url + "/v1/directive", json={})
            assert response.status == 404

    asyncio.run(scenario())


# -- directives -----------------------------------------------------------------------------------------------------


def test_first_report_of_a_process_says_who_it_is_and_that_it_is_unmanaged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path, pod_name="chat-0", pod_uid="pod-uid", accelerator="demo-gpu") as operator:
            report = await operator.report()
            assert (report.pod.name, report.pod.uid, report.model.digest) == ("chat-0", "pod-uid", DIGEST)
            assert (report.runtime.accelerator, report.ready, report.draining) == ("demo-gpu", True, False)
            assert report.held.state == "Unmanaged"
            assert [(e.class_name, e.point) for e in report.effective] == [("default", "full")]
            assert report.start_id

    asyncio.run(scenario())


def test_directive_is_acknowledged_by_the_effective_point_in_the_same_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            before = await operator.report()
            status, document = await operator.put(make_directive(3, 412, classes=[make_class(point="b500")]))
            report = Report.model_validate(document)
            assert status == 200
            assert (report.held.epoch, report.held.sequence, report.held.state) == (3, 412, "Managed")
            assert 29_000 < report.held.ttl_left_ms <= 30_000
            assert [(e.class_name, e.point) for e in report.effective] == [("gold", "b500")]
            assert report.effective[0].plan_version == before.effective[0].plan_version + 1

    asyncio.run(scenario())


def test_ack_waits_for_the_step_in_progress_but_not_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with pod(tmp_path, engine) as operator:
            engine.gate.clear()
            request = asyncio.create_task(operator.served.complete())
            await until(lambda: engine.has_work, "a step is in progress")
            await asyncio.sleep(0.05)
            _, document = await operator.put(make_directive(classes=[make_class(point="b500")]))
            assert [e["point"] for e in document["effective"]] == ["full"]  # ordered, not yet effective: the truth
            engine.gate.set()
            assert (await request)[0] == 200
            await until(lambda: operator.served.process.engine_loop.settled, "the plan is live")
            assert [e.point for e in (await operator.report()).effective] == ["b500"]

    asyncio.run(scenario())


def refusals() -> list[Any]:
    other = {"namespace": "team-a", "name": "chat", "uid": "another"}
    rows: list[tuple[str, dict[str, Any], int, str]] = [
        ("lower sequence", {"sequence": 9}, 409, "lower"),
        ("lower epoch", {"epoch": 1, "sequence": 99}, 409, "lower"),
        ("same fence other body", {"reason": "Other"}, 409, "another body"),
        ("other service", {"sequence": 11, "service": other}, 403, "another"),
        ("other artifact", {"sequence": 11, "modelDigest": "sha256:" + "f" * 64}, 412, "modelDigest"),
        ("unknown point", {"sequence": 11, "classes": [make_class(point="b1")]}, 422, "b1"),
        ("floor above ceiling", {"sequence": 11, "classes": [make_class(floor="full", ceiling="b500")]}, 422, "above"),
        ("point out of range", {"sequence": 11, "classes": [make_class(floor="b750", point="b500")]}, 422, "outside"),
        ("unknown safe point", {"sequence": 11, "envelope": {"ttlMs": 1000, "safePoint": "b1"}}, 422, "safePoint"),
        ("unknown default class", {"sequence": 11, "defaultClass": "silver"}, 422, "silver"),
        ("class twice", {"sequence": 11, "classes": [make_class(), make_class()]}, 422, "distinct"),
        ("nine classes", {"sequence": 11, "classes": [make_class(name=f"c{i}") for i in range(9)]}, 422, "classes"),
        ("no classes", {"sequence": 11, "classes": []}, 422, "classes"),
        ("other version", {"sequence": 11, "version": "control.v2"}, 422, "control.v1"),
        ("no envelope", {"sequence": 11, "envelope": None}, 422, "envelope"),
        ("negative time to live", {"sequence": 11, "envelope": {"ttlMs": -1, "safePoint": "full"}}, 422, "ttlMs"),
        ("thresholds swapped", {"sequence": 11, "governor": {"high": 400, "low": 600}}, 422, "low"),
    ]
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in rows]


@pytest.mark.parametrize(("changes", "status", "says"), refusals())
def test_refused_directive_says_why_and_what_is_held_and_state_is_unchanged(
    tmp_path: Path, changes: dict[str, Any], status: int, says: str
) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            assert (await operator.put(make_directive(2, 10)))[0] == 200
            before = await operator.report()
            answered, document = await operator.put(make_directive(**({"epoch": 2, "sequence": 10} | changes)))
            refusal = Refusal.model_validate(document)
            assert (answered, refusal.held.epoch, refusal.held.sequence) == (status, 2, 10)
            assert says in refusal.error
            assert refusal.known_points == ["b500", "b750", "full"]
            after = await operator.report()
            assert (after.held.fence, after.effective, after.held.state) == (
                before.held.fence,
                before.effective,
                before.held.state,
            )
            metrics = await operator.served.metrics()
            assert metrics[f'prism_runtime_directive_rejected_total{{code="{status}"}}'] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raw", "status"), [(b"{", 400), (b"[]", 400), (b"", 400), (b" " * MAX_BODY_BYTES + b"{}", 413)]
)
def test_malformed_or_oversized_body_is_refused_and_state_is_unchanged(tmp_path: Path, raw: bytes, status: int) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            answered, document = await operator.call("PUT", "/v1/directive", data=raw)
            assert answered == status
            assert document["held"]["state"] == "Unmanaged"
            assert (await operator.report()).held.epoch == 0
            assert (await operator.put(make_directive()))[0] == 200

    asyncio.run(scenario())


def test_equal_directive_is_an_idempotent_retry_that_renews_the_envelope(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            _, first = await operator.put(make_directive(classes=[make_class(point="b500")]))
            await asyncio.sleep(0.05)
            aged = await operator.report()
            assert aged.held.age_ms >= 50
            status, again = await operator.put(make_directive(classes=[make_class(point="b500")]))
            assert status == 200
            assert again["held"]["ageMs"] < aged.held.age_ms
            assert again["effective"] == first["effective"]

    asyncio.run(scenario())


def test_fields_of_a_newer_operator_are_ignored_and_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            newer = make_directive(
                colour="red",
                classes=[make_class(weight=3)],
                envelope={"ttlMs": 1000, "safePoint": "full", "slow": 1},
                governor={"high": 700, "mode": "x"},
            )
            status, document = await operator.put(newer)
            assert status == 200
            assert sorted(document["ignored"]) == ["classes[0].weight", "colour", "envelope.slow", "governor.mode"]
            assert (await operator.put(make_directive(1, 2)))[1]["ignored"] == []

    asyncio.run(scenario())


def test_silent_operator_ends_in_the_safe_point_while_the_pod_stays_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            await operator.put(make_directive(envelope={"ttlMs": 100, "safePoint": "b500"}))
            loop = operator.served.process.engine_loop
            await until(lambda: loop.held().state == "Expired" and loop.settled, "the envelope expired")
            report = await operator.report()
            assert (report.held.ttl_left_ms, report.effective[0].point, report.ready) == (0, "b500", True)
            metrics = await operator.served.metrics()
            assert metrics['prism_runtime_switches_total{cause="EnvelopeExpired"}'] == 1
            assert metrics['prism_runtime_envelope_state{state="Expired"}'] == 1
            _, document = await operator.put(make_directive(1, 2))
            assert (document["held"]["state"], document["effective"][0]["point"]) == ("Managed", "full")

    asyncio.run(scenario())


# -- classes, admission, counters -----------------------------------------------------------------------------------


def test_class_header_chooses_the_class_and_unknown_or_absent_is_the_default_class(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path, class_header="x-tier") as operator:
            await operator.put(make_directive(classes=[make_class(), make_class(name="bulk", point="b500")]))
            for headers in ({"x-tier": "bulk"}, {"x-tier": "nobody"}, {}, {"x-prism-class": "bulk"}):
                assert (await operator.served.complete(headers=headers, max_tokens=4))[0] == 200
            counters = {c.name: c for c in (await operator.report()).classes}
            assert counters["bulk"].tokens_by_point == {"b500": 4}
            assert counters["gold"].tokens_by_point == {"full": 12}

    asyncio.run(scenario())


def test_shed_answers_429_with_retry_after_for_that_class_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            classes = [make_class(), make_class(name="bulk", admission="Shed")]
            await operator.put(make_directive(classes=classes))
            body = {"model": "scripted", "prompt": "x"}
            url = f"{operator.served.url}/v1/completions"
            async with operator.served.http.post(url, json=body, headers={"x-prism-class": "bulk"}) as response:
                assert response.status == 429
                assert int(response.headers["Retry-After"]) > 0
                assert (await response.json())["error"]["type"] == "rate_limit_error"
            assert (await operator.served.complete())[0] == 200
            counters = {c.name: c for c in (await operator.report()).classes}
            assert (counters["bulk"].arrived, counters["bulk"].shed, counters["bulk"].missed) == (1, 1, 0)

    asyncio.run(scenario())


def test_counters_are_cumulative_and_survive_a_change_of_classes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path) as operator:
            await operator.put(make_directive())
            await operator.served.complete(max_tokens=4)
            renamed = [make_class(name="silver")]
            await operator.put(make_directive(1, 2, classes=renamed, defaultClass="silver"))
            await operator.served.complete(max_tokens=4)
            await operator.put(make_directive(1, 3))
            await operator.served.complete(max_tokens=4)
            counters = {c.name: c for c in (await operator.report()).classes}
            assert (counters["gold"].met, counters["silver"].met) == (2, 1)
            assert (counters["gold"].prompt_tokens, counters["gold"].output_tokens) == (10, 8)
            assert (sum(counters["gold"].ttft), sum(counters["gold"].tpot), counters["gold"].in_out[0]) == (2, 2, 2)

    asyncio.run(scenario())


def test_missed_objectives_are_counted_exactly(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pod(tmp_path, ScriptedEngine(step_s=0.01)) as operator:
            classes = [make_class(tpotMs=None, ttftMs=1), make_class(name="slow", ttftMs=None, tpotMs=1)]
            await operator.put(make_directive(classes=classes))
            await operator.served.complete(max_tokens=1)
            await operator.served.complete(max_tokens=5, headers={"x-prism-class": "slow"})
            await operator.served.complete(max_tokens=1, headers={"x-prism-class": "slow"})
            counters = {c.name: c for c in (await operator.report()).classes}
            assert (counters["gold"].met, counters["gold"].missed) == (0, 1)
            assert (counters["slow"].met, counters["slow"].missed) == (1, 1)

    asyncio.run(scenario())


# -- certificates ---------------------------------------------------------------------------------------------------


def test_pod_serves_while_its_certificates_are_missing_and_takes_directives_once_they_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        authority = Authority()
        context = authority.client(tmp_path / "operator")
        async with serving(ScriptedEngine(), tls_dir=tmp_path / "tls", certificate_poll_s=0.02) as served:
            assert (await served.complete())[0] == 200
            operator = Operator(served, context)
            with pytest.raises(aiohttp.ClientConnectionError):
                await operator.report()
            authority.write_server(tmp_path / "tls")
            await wait_open(operator)
            assert (await operator.put(make_directive()))[0] == 200

    asyncio.run(scenario())


def test_rotated_certificates_are_taken_into_the_live_listener_while_open_connections_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        old, new = Authority("old"), Authority("new")
        serial = old.write_server(tmp_path / "tls")
        async with serving(ScriptedEngine(), tls_dir=tmp_path / "tls", certificate_poll_s=0.02) as served:
            operator = Operator(served, old.client(tmp_path / "old"))
            await wait_open(operator)
            first = await operator.report()
            assert first.tls is not None
            assert first.tls.leaf_serial == serial
            url = f"https://127.0.0.1:{served.ports['control_port']}/v1/report"
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=operator.context)) as kept:
                await (await kept.get(url, server_hostname=SERVER_NAME)).read()
                bundle = old.pem + new.pem
                serial = new.write_server(tmp_path / "tls", trust=bundle)
                await until(lambda: served.process.certificates.state.leaf_serial == serial, "reloaded")
                await (await kept.get(url, server_hostname=SERVER_NAME)).read()
            renewed = Operator(served, new.client(tmp_path / "new"))
            second = await renewed.report()
            assert second.tls is not None
            assert second.tls.leaf_serial == serial
            assert second.tls.trust_hash != first.tls.trust_hash
            metrics = await served.metrics()
            assert 0 < metrics['prism_cert_expiry_seconds{role="server"}'] < 3600

    asyncio.run(scenario())


def test_half_written_certificates_leave_the_old_ones_serving(tmp_path: Path) -> None:
    async def scenario() -> None:
        authority = Authority()
        authority.write_server(tmp_path / "tls")
        async with serving(ScriptedEngine(), tls_dir=tmp_path / "tls", certificate_poll_s=0.01) as served:
            operator = Operator(served, authority.client(tmp_path / "operator"))
            await wait_open(operator)
            before = (await operator.report()).tls
            whole: dict[str, bytes] = {p.name: p.read_bytes() for p in (tmp_path / "tls").iterdir()}
            breaks: list[Callable[[], object]] = [
                lambda: (tmp_path / "tls" / "tls.crt").unlink(),
                lambda: (tmp_path / "tls" / "tls.crt").write_bytes(b"no certificate"),
                lambda: (tmp_path / "tls" / "tls.key").write_bytes(authority.issue(client=False)[1]),
                lambda: (tmp_path / "tls" / "ca.crt").write_bytes(b""),
            ]
            for break_it in breaks:
                break_it()
                assert not served.process.certificates.load()
                assert (await operator.report()).tls == before
                for name, content in whole.items():
                    (tmp_path / "tls" / name).write_bytes(content)
            assert served.process.certificates.load()

    asyncio.run(scenario())
