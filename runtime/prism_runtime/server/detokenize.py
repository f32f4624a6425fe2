"""Token ids to text as they come, without ever splitting a character or a stop string.

Byte-level tokenizers make tokens that end inside a UTF-8 character; decoded alone, such a token is a replacement
character. So text is decoded in context, and a trailing replacement character waits for the token that completes it.
"""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 16
"""A UTF-8 character has at most 4 bytes, so at most 3 tokens are undecided; the rest of the window is margin."""


class Decoder(Protocol):
    """What both tokenizer libraries offer."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Incremental decoding of one answer. The concatenation of all pieces equals decoding all ids at once."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._sent = 0

    def push(self, token_id: int) -> str:
        """Text that this token makes certain; may be empty."""
        self._window.append(token_id)
        text = self._decode()
        stable = text[:-1] if text.endswith(REPLACEMENT) else text
        piece, self._sent = stable[self._sent :], max(self._sent, len(stable))
        if len(self._window) >= WINDOW_TOKENS:
            self._shrink()
        return piece

    def flush(self) -> str:
        """What is left at the end of an answer: an incomplete character, as a replacement character."""
        piece, self._sent = self._decode()[self._sent :], 0
        self._window = []
        return piece

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=True)

    def _shrink(self) -> None:
        """Keep the last tokens as context; all they decode to is sent, but for a trailing incomplete character."""
        held = self._decode().endswith(REPLACEMENT)
        self._window = self._window[-WINDOW_TOKENS // 2 :]
        self._sent = len(self._decode()) - (1 if held else 0)


class StopStrings:
    """Cuts an answer before the first stop string, wherever token borders fall.

    Text that could be the beginning of a stop string is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Text that may be sent; after `stopped` turns true there is no more."""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held text of an answer that ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
