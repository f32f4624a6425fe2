"""One answer as text: token events in, pieces of text out, and the shapes of OpenAI's responses around them."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from prism_runtime.engine.types import Finished, FinishReason, Token
from prism_runtime.server.detokenize import Decoder, Detokenizer, StopStrings
from prism_runtime.server.dispatch import Generation


class GenerationFailed(Exception):
    """The engine ended this request without an answer; the message is free of user text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain with one event; the last piece carries the reason."""

    text: str
    finish_reason: str | None = None


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0

    def to_wire(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Answer:
    """Reads a generation to its end. One piece a token, empty while a character or stop string is undecided:

    clients that measure time per token count pieces.
    """

    def __init__(self, generation: Generation, decoder: Decoder, stops: Sequence[str]) -> None:
        self.generation = generation
        self.usage = Usage(prompt_tokens=len(generation.request.prompt))
        self.point: int | None = None
        self._text = Detokenizer(decoder)
        self._stops = StopStrings(stops)

    async def first(self) -> Piece:
        """The first piece: after it the operating point is known. Raises GenerationFailed."""
        return await self._next()

    async def rest(self, first: Piece) -> AsyncIterator[Piece]:
        """All pieces, beginning with `first`. Raises GenerationFailed."""
        piece = first
        while True:
            yield piece
            if piece.finish_reason:
                return
            piece = await self._next()

    async def _next(self) -> Piece:
        event = await self.generation.next()
        if isinstance(event, Token):
            self.usage.completion_tokens += 1
            if self.point is None:
                self.point = event.point
            text = self._stops.push(self._text.push(event.token_id))
            if self._stops.stopped:
                self.generation.complete()
                return Piece(text, FinishReason.STOP)
            finished = self.generation.take_finished()
            return self._last(text, finished) if finished else Piece(text)
        return self._last("", event)

    def _last(self, text: str, event: Finished) -> Piece:
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise GenerationFailed(event.error or f"the request ended as {event.reason}")
        text += self._stops.push(self._text.flush())
        if self._stops.stopped:
            return Piece(text, FinishReason.STOP)
        return Piece(text + self._stops.flush(), event.reason)


class CompletionShape:
    """Bodies of /v1/completions."""

    def __init__(self, response_id: str, model: str) -> None:
        self._head = {"id": f"cmpl-{response_id}", "object": "text_completion", "created": int(time.time())}
        self._head |= {"model": model}

    def opening(self) -> dict[str, Any] | None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._head | {"choices": [self._choice(piece.text, piece.finish_reason)]}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": [self._choice(text, finish_reason)], "usage": usage.to_wire()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage.to_wire()}

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


class ChatShape:
    """Bodies of /v1/chat/completions."""

    def __init__(self, response_id: str, model: str) -> None:
        self._head: dict[str, Any] = {"id": f"chatcmpl-{response_id}", "created": int(time.time()), "model": model}

    def opening(self) -> dict[str, Any] | None:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk({"content": piece.text}, piece.finish_reason)

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": usage.to_wire()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.to_wire()}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}


Shape = CompletionShape | ChatShape
