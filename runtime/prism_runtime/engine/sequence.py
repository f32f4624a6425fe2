"""A request on its way through the engine, and the piece of it that one step runs."""

import random
from dataclasses import dataclass, field

from prism_runtime.engine.blocks import Context
from prism_runtime.engine.types import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens (prompt, then generated) and, while it runs, its memory.

    rank           (minus priority, arrival): who is stopped last where memory runs out
    to_read        how many of its tokens are read as a prompt since it last started: those it had then
    first_token_s  when its first token came; None before
    """

    request: Request
    rank: tuple[int, int]
    arrived_s: float
    tokens: list[int] = field(repr=False)
    draws: random.Random = field(repr=False)
    to_read: int = 0
    first_token_s: float | None = None
    context: Context | None = None

    @property
    def cached(self) -> int:
        return self.context.cached if self.context else 0

    @property
    def unread(self) -> int:
        """Tokens still to be run before its next one can come."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        return self.cached < self.to_read


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` tokens of a sequence, from the first that is not cached, to run in this step at operating `point`."""

    sequence: Sequence
    length: int
    point: int

    @property
    def completes(self) -> bool:
        """True if the slice ends with the sequence's last token, so that its logits give the next one."""
        return self.sequence.cached + self.length == len(self.sequence.tokens)
