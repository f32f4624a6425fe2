"""What the door accepts, refuses and says; every refusal is 4xx, by name, and leaves the engine and others unharmed."""

import asyncio
import logging
from typing import Any

import pytest

from prism_runtime.engine.types import Overloaded
from prism_runtime.server.openai import MAX_BODY_BYTES
from tests.runtime.serving.engine import END, MODEL, ScriptedEngine
from tests.runtime.serving.process import serving


def refusals() -> list[Any]:
    rows: list[tuple[str, dict[str, Any], int, str]] = [
        ("empty prompt", {"prompt": ""}, 400, "prompt"),
        ("no token ids", {"prompt": []}, 400, "prompt"),
        ("over-long prompt", {"prompt": "x" * 600}, 400, "max_tokens"),
        ("id out of vocabulary", {"prompt": [1, 99999]}, 400, "prompt"),
        ("negative id", {"prompt": [-1]}, 400, "prompt"),
        ("several prompts", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("prompt of a wrong type", {"prompt": 7}, 400, "prompt"),
        ("text that is no Unicode", {"prompt": "\ud800"}, 400, "prompt"),
        ("no prompt", {"prompt": None}, 400, "prompt"),
        ("unknown parameter", {"colour": "red"}, 400, "colour"),
        ("unknown stream option", {"stream": True, "stream_options": {"colour": 1}}, 400, "colour"),
        ("stream options without stream", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("no choice", {"n": 0}, 400, "n"),
        ("too many choices", {"n": 17}, 400, "n"),
        ("six log probabilities", {"logprobs": 6}, 400, "logprobs"),
        ("a penalty too large", {"presence_penalty": 2.5}, 400, "presence_penalty"),
        ("a repetition penalty of zero", {"repetition_penalty": 0}, 400, "repetition_penalty"),
        ("top_k below minus one", {"top_k": -2}, 400, "top_k"),
        ("min_p above one", {"min_p": 1.5}, 400, "min_p"),
        ("a bias of a word", {"logit_bias": {"the": 1}}, 400, "logit_bias"),
        ("a bias too large", {"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ("tools", {"tools": [{"type": "function"}]}, 400, "tools"),
        ("no tokens wanted", {"max_tokens": 0}, 400, "max_tokens"),
        ("a truth value as a number", {"max_tokens": True}, 400, "max_tokens"),
        ("temperature as text", {"temperature": "1"}, 400, "temperature"),
        ("temperature not a number", {"temperature": float("nan")}, 400, "temperature"),
        ("temperature too high", {"temperature": 2.5}, 400, "temperature"),
        ("top_p of zero", {"top_p": 0}, 400, "top_p"),
        ("seed beyond 64 bits", {"seed": 2**64}, 400, "seed"),
        ("five stop strings", {"stop": list("abcde")}, 400, "stop"),
        ("empty stop string", {"stop": ""}, 400, "stop"),
        ("unknown model", {"model": "other"}, 404, "model"),
        ("no model", {"model": None}, 400, "model"),
    ]
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in rows]


@pytest.mark.parametrize(("body", "status", "parameter"), refusals())
def test_bad_request_is_refused_by_name_before_it_reaches_the_engine(
    body: dict[str, Any], status: int, parameter: str
) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            answered, answer = await served.complete(**body)
            assert (answered, answer["error"]["param"]) == (status, parameter), answer
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["type"] == "invalid_request_error"
            assert parameter in answer["error"]["message"] or parameter in ("prompt", "max_tokens")
            assert engine.requests == []
            assert (await served.complete())[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe", b"[1]", b'"text"', b"[" * 100_000, b"9" * 5000])
def test_body_that_is_no_json_object_is_refused_with_400(raw: bytes) -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            async with served.http.post(f"{served.url}/v1/completions", data=raw) as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == "invalid_json"
            assert (await served.complete())[0] == 200

    asyncio.run(scenario())


def test_body_over_one_megabyte_is_refused_with_413_in_the_apis_shape() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            status, answer = await served.complete(prompt="x" * MAX_BODY_BYTES)
            assert (status, answer["error"]["code"]) == (413, "body_too_large")

    asyncio.run(scenario())


def test_bad_requests_harm_no_stream_beside_them() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"y" * 400)
        async with serving(engine) as served:
            good = asyncio.create_task(served.complete(max_tokens=200))
            bad = [served.complete(prompt=[99999]), served.complete(colour=1), served.complete(prompt="")] * 20
            assert {status for status, _ in await asyncio.gather(*bad)} == {400}
            status, answer = await good
            assert (status, answer["choices"][0]["text"]) == (200, "y" * 200)

    asyncio.run(scenario())


def test_unknown_path_and_wrong_method_are_answered_in_the_apis_shape() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
                async with served.http.request(method, served.url + path) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["type"] == "invalid_request_error"

    asyncio.run(scenario())


def test_neutral_values_of_parameters_without_implementation_are_accepted() -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": None, "tools": []}

    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            assert (await served.complete(**neutral))[0] == 200

    asyncio.run(scenario())


def test_sampling_parameters_reach_the_engine_as_they_were_sent() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            await served.complete(prompt=[1, 2, 3], temperature=0, top_p=0.5, seed=-7, max_tokens=3)
            await served.complete(ignore_eos=True)
            shaped = {
                "top_k": 4,
                "min_p": 0.1,
                "presence_penalty": 1,
                "frequency_penalty": -0.5,
                "logit_bias": {"7": -9},
            }
            await served.complete(**shaped, repetition_penalty=1.2, logprobs=2)
            await served.complete(top_k=-1)
        first, second, third, fourth = engine.requests
        assert first.prompt == (1, 2, 3)
        sampling = first.sampling
        assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0.0, 0.5, -7, 3)
        assert sampling.stop_token_ids == {END}
        assert second.sampling.stop_token_ids == frozenset()
        assert (third.sampling.top_k, third.sampling.min_p, third.sampling.top_logprobs) == (4, 0.1, 2)
        penalties = third.sampling
        assert (penalties.presence_penalty, penalties.frequency_penalty) == (1.0, -0.5)
        assert (penalties.repetition_penalty, penalties.logit_bias) == (1.2, ((7, -9.0),))
        assert fourth.sampling.top_k == 0

    asyncio.run(scenario())


def test_answer_carries_usage_headers_and_the_request_id_it_was_given() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(lambda request: b"abc"), boot_point="b750") as served:
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 8}
            headers = {"x-request-id": "trace.1"}
            async with served.http.post(f"{served.url}/v1/completions", json=body, headers=headers) as response:
                answer = await response.json()
                assert response.headers["x-request-id"] == "trace.1"
                assert response.headers["x-prism-operating-point"] == "b750"
                assert response.headers["x-prism-budget-permille"] == "750"
            assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
            assert answer["choices"][0]["finish_reason"] == "stop"
            async with served.http.post(
                f"{served.url}/v1/completions", json={}, headers={"x-request-id": "a b"}
            ) as bad:
                assert bad.headers["x-request-id"] != "a b"

    asyncio.run(scenario())


def test_completion_defaults_to_16_tokens_and_a_chat_to_the_room_left() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: b"z" * 1000)
        async with serving(engine) as served:
            await served.complete(max_tokens=None)
            chat = {
                "model": MODEL,
                "messages": [{"role": "system", "content": "ab"}, {"role": "user", "content": "cd"}],
            }
            async with served.http.post(f"{served.url}/v1/chat/completions", json=chat) as response:
                answer = await response.json()
        assert engine.requests[0].sampling.max_tokens == 16
        assert bytes(engine.requests[1].prompt) == b"ab\n\ncd"
        assert answer["usage"]["total_tokens"] == 512
        assert answer["choices"][0]["message"]["role"] == "assistant"

    asyncio.run(scenario())


def test_chat_refuses_two_limits_at_once_and_unknown_roles() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            messages = [{"role": "user", "content": "hi"}]
            for changes, parameter in (
                ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
                ({"messages": [{"role": "owner", "content": "hi"}]}, "messages.0.role"),
                ({"messages": []}, "messages"),
            ):
                body = {"model": MODEL, "messages": messages} | changes
                async with served.http.post(f"{served.url}/v1/chat/completions", json=body) as response:
                    answer = await response.json()
                    assert (response.status, answer["error"]["param"]) == (400, parameter), answer

    asyncio.run(scenario())


def test_models_lists_the_one_model_and_others_are_not_found() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(), served_name="org/tiny") as served:
            async with served.http.get(f"{served.url}/v1/models") as response:
                assert [m["id"] for m in (await response.json())["data"]] == ["org/tiny"]
            async with served.http.get(f"{served.url}/v1/models/org/tiny") as response:
                assert (await response.json())["max_model_len"] == 512
            async with served.http.get(f"{served.url}/v1/models/other") as response:
                assert response.status == 404

    asyncio.run(scenario())


def test_quality_header_is_refused_rather_than_ignored() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            status, answer = await served.complete(headers={"x-prism-min-relative-quality": "0.99"})
            assert (status, answer["error"]["param"]) == (400, "x-prism-min-relative-quality")

    asyncio.run(scenario())


def test_logs_never_hold_the_prompt_nor_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    prompt, reply = "my-secret-prompt", "my-secret-reply"

    async def scenario() -> None:
        engine = ScriptedEngine(lambda request: reply.encode())
        async with serving(engine) as served:
            await served.complete(prompt=prompt, max_tokens=20)
            for body in ({"stop": [prompt] * 9}, {prompt: 1}, {"max_tokens": prompt}, {"prompt": [prompt]}):
                await served.complete(**body)
            engine.fail_steps = 1
            assert (await served.complete(prompt=prompt))[0] == 500
            engine.tokenizer.encode_special_tokens = True
            served.process.dispatcher.submit = None  # type: ignore[assignment, method-assign]
            assert (await served.complete(prompt=prompt))[0] == 500

    caplog.set_level(logging.DEBUG)
    asyncio.run(scenario())
    assert "engine step failed" in caplog.text
    assert "request failed" in caplog.text
    everything = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert "secret" not in everything


def test_first_error_of_a_failing_step_is_500_and_the_next_request_is_served() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            engine.fail_steps = 1
            status, answer = await served.complete()
            assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "engine_error")
            assert (await served.complete())[0] == 200
            metrics = await served.metrics()
            assert metrics['prism_runtime_requests_total{class="default",outcome="missed"}'] == 1
            assert metrics["prism_runtime_failed_steps_total"] == 1

    asyncio.run(scenario())


def test_request_without_room_is_answered_429_with_the_time_to_come_back_and_counted_as_shed() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as served:
            engine.overloaded = Overloaded(wait_s=4.2, ttft_s=1.0)
            document = {"model": MODEL, "prompt": "hello"}
            async with served.http.post(f"{served.url}/v1/completions", json=document) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "4")
                error = (await response.json())["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
            assert error["message"] == (
                "class 'default' has no room: the first token would come in 4.2 s, 1 s are promised; retry in 4 s"
            )
            engine.overloaded = None
            assert (await served.complete())[0] == 200
            totals = served.process.accounting.totals["default"]
            assert (totals.arrived, totals.shed, totals.met) == (2, 1, 1)
            assert not served.process.engine_loop.signals.in_flight()

    asyncio.run(scenario())
