"""The OpenAI-compatible API: completions, chat completions, models; probes and metrics on the same port.

Status and headers wait for the first token: an error before it is a plain HTTP error, and the headers name the
operating point that made it. An error after it is the stream's last event, in place of `[DONE]`.
"""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CollectorRegistry

from prism_runtime.engine.types import Rejected
from prism_runtime.server.answers import (
    Answer,
    ChatShape,
    Choice,
    CompletionShape,
    GenerationFailed,
    Piece,
    Shape,
    merged,
    usage_of,
)
from prism_runtime.server.dispatch import Dispatcher, Generation
from prism_runtime.server.drain import Lifecycle, Phase
from prism_runtime.server.errors import ApiError, failed, unavailable
from prism_runtime.server.exposition import metrics_handler
from prism_runtime.server.logs import where
from prism_runtime.server.schema import ChatRequest, CompletionRequest, parse
from prism_runtime.server.tokenizer import TextCodec

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions without `max_tokens`; chats default to the room left in the context."""
INLINE_ENCODE_CHARACTERS = 4096
"""Longer texts are encoded on a thread: a full body takes long enough to stall every stream of the event loop."""
QUALITY_HEADER = "x-prism-min-relative-quality"
REQUEST_ID = web.RequestKey("request_id", str)
Answers = Sequence[Answer]
Indexed = tuple[int, Piece]
"""A choice's index, and a piece of it."""
TAKEN_OVER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What clients see of the model."""

    name: str
    created_s: int
    max_context_tokens: int
    eos_token_ids: frozenset[int]


class OpenAiApi:
    """Handlers of the service port."""

    def __init__(
        self,
        model: ServedModel,
        codec: TextCodec,
        dispatcher: Dispatcher,
        lifecycle: Lifecycle,
        registry: CollectorRegistry,
        class_header: str,
    ) -> None:
        self._model = model
        self._codec = codec
        self._dispatcher = dispatcher
        self._lifecycle = lifecycle
        self._registry = registry
        self._class_header = class_header
        self._busy: set[RequestHandler] = set()

    def app(self) -> web.Application:
        middlewares = [self._follow_connection, self._answer_errors]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._one_model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", metrics_handler(self._registry))
        return app

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self._check_accepting(request)
        body = parse(CompletionRequest, await request.read())
        self._check_model(body.model)
        prompt = await self._encode(body.prompt) if isinstance(body.prompt, str) else tuple(body.prompt)
        room = self._model.max_context_tokens - len(prompt)
        max_tokens = body.max_tokens or max(1, min(DEFAULT_COMPLETION_TOKENS, room))
        shape = CompletionShape(secrets.token_hex(12), self._model.name)
        return await self._answer(request, body, prompt, max_tokens, shape)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._check_accepting(request)
        body = parse(ChatRequest, await request.read())
        self._check_model(body.model)
        if body.max_tokens and body.max_completion_tokens:
            raise ApiError(
                400,
                "set `max_completion_tokens` or `max_tokens`, not both",
                param="max_completion_tokens",
                code="invalid_value",
            )
        messages = [message.model_dump() for message in body.messages]
        prompt = await asyncio.to_thread(self._codec.encode_chat, messages)
        room = self._model.max_context_tokens - len(prompt)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, room)
        return await self._answer(request, body, prompt, max_tokens, ChatShape(secrets.token_hex(12), self._model.name))

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_object()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._model_object())

    async def _health(self, _: web.Request) -> web.Response:
        """Liveness: steps run or could run. Not a matter of load, readiness or the operator."""
        if self._dispatcher.engine_loop.alive:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "engine stalled"}, status=503)

    async def _ready(self, _: web.Request) -> web.Response:
        phase = self._lifecycle.phase
        return web.json_response({"status": phase.value}, status=200 if self._lifecycle.ready else 503)

    # -- answering ----------------------------------------------------------------------------------------------

    async def _answer(
        self,
        request: web.Request,
        body: CompletionRequest | ChatRequest,
        prompt: tuple[int, ...],
        max_tokens: int,
        shape: Shape,
    ) -> web.StreamResponse:
        service_class = self._dispatcher.engine_loop.classes.resolve(request.headers.get(self._class_header))
        generations: list[Generation] = []
        try:
            for sampling in body.samplings(max_tokens, self._model.eos_token_ids):
                generations.append(self._dispatcher.submit(prompt, sampling, service_class))
            answers = [Answer(generation, self._codec, body.stops) for generation in generations]
            async with aclosing(merged(answers)) as pieces:
                first = await anext(pieces)
                if body.stream:
                    return await self._stream(request, answers, first, pieces, shape, body)
                return await self._whole(request, answers, first, pieces, shape)
        except Rejected as rejected:
            raise ApiError.of(rejected) from rejected
        except GenerationFailed as error:
            raise failed(str(error)) from error
        finally:
            for generation in generations:
                generation.abandon()  # reached early only if the client is gone or another choice failed

    async def _whole(
        self, request: web.Request, answers: Answers, first: Indexed, pieces: AsyncIterator[Indexed], shape: Shape
    ) -> web.Response:
        by_choice: list[list[Piece]] = [[] for _ in answers]
        by_choice[first[0]].append(first[1])
        async for index, piece in pieces:
            by_choice[index].append(piece)
        response = web.json_response(shape.whole([Choice.of(each) for each in by_choice], usage_of(answers)))
        self._head(request, response, answers[first[0]])
        return response

    async def _stream(
        self,
        request: web.Request,
        answers: Answers,
        first: Indexed,
        pieces: AsyncIterator[Indexed],
        shape: Shape,
        body: CompletionRequest | ChatRequest,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        self._head(request, response, answers[first[0]])
        await response.prepare(request)
        for index in range(len(answers)):
            if opening := shape.opening(index):
                await response.write(_event(opening))
        try:
            await response.write(_event(shape.chunk(*first)))
            async for index, piece in pieces:
                await response.write(_event(shape.chunk(index, piece)))
        except GenerationFailed as error:
            await response.write(_event(failed(str(error)).body))
            await response.write_eof()
            return response
        if body.include_usage:
            await response.write(_event(shape.usage(usage_of(answers))))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _head(self, request: web.Request, response: web.StreamResponse, answer: Answer) -> None:
        response.headers["x-request-id"] = request[REQUEST_ID]
        if answer.point is not None:
            point = self._dispatcher.engine_loop.engine.ladder.points[answer.point]
            response.headers["x-prism-operating-point"] = point.name
            response.headers["x-prism-budget-permille"] = str(point.budget_permille)

    # -- the door -----------------------------------------------------------------------------------------------

    def _check_accepting(self, request: web.Request) -> None:
        if self._lifecycle.phase is Phase.STARTING:
            raise unavailable("the server is starting", "starting", retry_after_s=2)
        if not self._lifecycle.accepting:
            raise unavailable("the server is shutting down", "draining", retry_after_s=1)
        if QUALITY_HEADER in request.headers:
            raise ApiError(
                400,
                f"header `{QUALITY_HEADER}` is not implemented; choose a class with `{self._class_header}`",
                param=QUALITY_HEADER,
                code="unsupported_parameter",
            )

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise ApiError(
                404,
                f"this server has one model, '{self._model.name}'; set `model` to it",
                param="model",
                code="model_not_found",
            )

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created_s,
            "owned_by": "moe-prism",
            "max_model_len": self._model.max_context_tokens,
        }

    async def _encode(self, text: str) -> tuple[int, ...]:
        if len(text) <= INLINE_ENCODE_CHARACTERS:
            return self._codec.encode(text)
        return await asyncio.to_thread(self._codec.encode, text)

    @web.middleware
    async def _follow_connection(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Know which connections have a request; while the pod leaves, close each after its answer."""
        self._busy.add(request.protocol)
        try:
            response: web.StreamResponse = await handler(request)
        finally:
            self._busy.discard(request.protocol)
        if self._lifecycle.draining:
            response.force_close()
        return response

    def close_idle(self, connections: Iterable[RequestHandler]) -> None:
        """Close the connections without a request: a client that finds one closed can safely try elsewhere."""
        for connection in connections:
            if connection not in self._busy:
                connection.force_close()

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if TAKEN_OVER_ID.fullmatch(given) else secrets.token_hex(8)
        try:
            response: web.StreamResponse = await handler(request)
        except ApiError as error:
            response = self._error(request, error)
        except web.HTTPRequestEntityTooLarge:
            response = self._error(
                request, ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes", code="body_too_large")
            )
        except web.HTTPException as error:
            response = self._error(request, ApiError(error.status, f"{request.path[:128]}: {error.reason}"))
        except ConnectionError:
            raise  # the client is gone: there is nobody to answer
        except Exception as error:
            facts = {"request": request[REQUEST_ID], "error": type(error).__name__, "at": where(error)}
            log.error("request failed", extra=facts)
            response = self._error(
                request, failed("internal error; the server's log names it by this request's id", "internal_error")
            )
        if not response.prepared:
            response.headers["x-request-id"] = request[REQUEST_ID]
        return response

    def _error(self, request: web.Request, error: ApiError) -> web.Response:
        response = web.json_response(error.body, status=error.status)
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = str(error.retry_after_s)
        return response


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
