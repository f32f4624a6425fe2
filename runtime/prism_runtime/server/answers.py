"""One answer as text: token events in, pieces of text out, and the shapes of OpenAI's responses around them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from prism_runtime.engine.types import Finished, FinishReason, Token
from prism_runtime.server.detokenize import Decoder, Detokenizer, StopStrings
from prism_runtime.server.dispatch import Generation


class GenerationFailed(Exception):
    """The engine ended this request without an answer; the message is free of user text."""


@dataclass(frozen=True, slots=True)
class Chance:
    """A token's text and log probability, those of the most likely tokens in its place, and where its text begins."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain with one event; the last piece carries the reason. `chance` is of the event's token, if
    the request asked for log probabilities."""

    text: str
    finish_reason: str | None = None
    chance: Chance | None = None


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
        self._decoder = decoder
        self._text = Detokenizer(decoder)
        self._offset = 0
        self._stops = StopStrings(stops)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces to the one with a reason. Raises GenerationFailed."""
        while True:
            piece = await self._next()
            yield piece
            if piece.finish_reason:
                return

    async def _next(self) -> Piece:
        event = await self.generation.next()
        if isinstance(event, Token):
            self.usage.completion_tokens += 1
            if self.point is None:
                self.point = event.point
            chance = self._chance(event)
            text = self._stops.push(self._text.push(event.token_id))
            if self._stops.stopped:
                self.generation.complete()
                return Piece(text, FinishReason.STOP, chance)
            finished = self.generation.take_finished()
            return self._last(text, finished, chance) if finished else Piece(text, chance=chance)
        return self._last("", event)

    def _chance(self, event: Token) -> Chance | None:
        if event.log_probabilities is None:
            return None
        text, offset = self._alone(event.token_id), self._offset
        self._offset += len(text)
        top = tuple((self._alone(token), logprob) for token, logprob in event.log_probabilities.top)
        return Chance(text, event.log_probabilities.token, top, offset)

    def _alone(self, token_id: int) -> str:
        """A token's own text; half a character is a replacement character here."""
        return self._decoder.decode([token_id], skip_special_tokens=False)

    def _last(self, text: str, event: Finished, chance: Chance | None = None) -> Piece:
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise GenerationFailed(event.error or f"the request ended as {event.reason}")
        text += self._stops.push(self._text.flush())
        if self._stops.stopped:
            return Piece(text, FinishReason.STOP, chance)
        return Piece(text + self._stops.flush(), event.reason, chance)


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of all choices as they come, each with its choice's index. Raises GenerationFailed if one fails.

    Close it (`contextlib.aclosing`): several choices are read by tasks of their own.
    """
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    read: asyncio.Queue[tuple[int, Piece | GenerationFailed]] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                read.put_nowait((index, piece))
        except GenerationFailed as error:
            read.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        unfinished = len(answers)
        while unfinished:
            index, event = await read.get()
            if isinstance(event, GenerationFailed):
                raise event
            unfinished -= event.finish_reason is not None
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Of all choices; they share one prompt."""
    return Usage(answers[0].usage.prompt_tokens, sum(answer.usage.completion_tokens for answer in answers))


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    finish_reason: str
    chances: Sequence[Chance]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Choice":
        text = "".join(piece.text for piece in pieces)
        return cls(text, pieces[-1].finish_reason or "", [piece.chance for piece in pieces if piece.chance])


class CompletionShape:
    """Bodies of /v1/completions."""

    def __init__(self, response_id: str, model: str) -> None:
        self._head = {"id": f"cmpl-{response_id}", "object": "text_completion", "created": int(time.time())}
        self._head |= {"model": model}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        chances = [piece.chance] if piece.chance else []
        return self._head | {"choices": [self._choice(index, piece.text, piece.finish_reason, chances)]}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        listed = [self._choice(i, one.text, one.finish_reason, one.chances) for i, one in enumerate(choices)]
        return self._head | {"choices": listed, "usage": usage.to_wire()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage.to_wire()}

    def _choice(self, index: int, text: str, finish_reason: str | None, chances: Sequence[Chance]) -> dict[str, Any]:
        logprobs = {
            "tokens": [chance.text for chance in chances],
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [dict(chance.top) for chance in chances],
            "text_offset": [chance.offset for chance in chances],
        }
        return {"index": index, "text": text, "logprobs": logprobs if chances else None, "finish_reason": finish_reason}


class ChatShape:
    """Bodies of /v1/chat/completions."""

    def __init__(self, response_id: str, model: str) -> None:
        self._head: dict[str, Any] = {"id": f"chatcmpl-{response_id}", "created": int(time.time()), "model": model}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(index, {"content": piece.text}, piece.finish_reason, [piece.chance] if piece.chance else [])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        listed = [
            self._choice(index, one.finish_reason, one.chances)
            | {"message": {"role": "assistant", "content": one.text}}
            for index, one in enumerate(choices)
        ]
        return self._head | {"object": "chat.completion", "choices": listed, "usage": usage.to_wire()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.to_wire()}

    def _chunk(
        self, index: int, delta: dict[str, str], finish_reason: str | None, chances: Sequence[Chance] = ()
    ) -> dict[str, Any]:
        choice = self._choice(index, finish_reason, chances) | {"delta": delta}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _choice(self, index: int, finish_reason: str | None, chances: Sequence[Chance]) -> dict[str, Any]:
        content = [
            _chat_token(chance.text, chance.logprob)
            | {"top_logprobs": [_chat_token(text, logprob) for text, logprob in chance.top]}
            for chance in chances
        ]
        logprobs = {"content": content, "refusal": None} if chances else None
        return {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


Shape = CompletionShape | ChatShape
