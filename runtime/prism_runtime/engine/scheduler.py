"""Who runs in the next step: every decoding sequence, and as much of the waiting prompts as the step's cap allows.

Requests rank by priority (higher first), then arrival. The first of the queue is not overtaken: letting small requests
pass while it waits for memory would starve it under load. Memory is taken as sequences grow, not when they start; if
there is none left, the running sequence of the lowest rank gives up its own, waits, and computes it again later. The
sequence of the highest rank is therefore never stopped, so everything ends.
"""

import heapq
import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from prism_runtime.engine.blocks import BlockPool, Context
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.types import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens (prompt, then generated) and, while it runs, its memory.

    to_read  how many of its tokens are read as a prompt since it last started: those it had then
    """

    request: Request
    rank: tuple[int, int]
    tokens: list[int] = field(repr=False)
    draws: random.Random = field(repr=False)
    to_read: int = 0
    context: Context | None = None

    @property
    def cached(self) -> int:
        return self.context.cached if self.context else 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        return self.cached < self.to_read


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` tokens of a sequence, from the first that is not cached, to run in this step."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """True if the slice ends with the sequence's last token, so that its logits give the next one."""
        return self.sequence.cached + self.length == len(self.sequence.tokens)


@dataclass(slots=True)
class Counts:
    """Since the start. Tokens of prompts when first started, and how many of them were not computed again."""

    preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_known: int = 0


def context_tokens(request: Request) -> int:
    """The longest context a request can reach. Its last token is never run, but counting it keeps the rule simple."""
    return len(request.prompt) + request.sampling.max_tokens


class Scheduler:
    """Owns the queue, the running sequences and their memory. One thread calls it.

    A request's longest context must fit the pool, else it could wait for ever.
    """

    def __init__(self, pool: BlockPool, max_sequences: int, prefill_tokens_per_step: int, seed: int) -> None:
        self.pool = pool
        self.running: dict[str, Sequence] = {}
        self.counts = Counts()
        self._max_sequences = max_sequences
        self._cap = prefill_tokens_per_step
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._arrivals = 0
        self._seeds = random.Random(seed)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enqueue(self, request: Request) -> None:
        seed = request.sampling.seed
        draws = random.Random(self._seeds.getrandbits(64) if seed is None else seed)
        self._wait(Sequence(request, (-request.priority, self._arrivals), list(request.prompt), draws))
        self._arrivals += 1

    def schedule(self, class_point: Items[int], points: int) -> tuple[list[Slice], list[Slice]]:
        """(decode, prefill) slices of the next step; starts waiting requests while the prefill cap lasts.

        class_point  operating point of each service class, of `points` in all: a request may begin with keys and values
                     that were computed at its point or a larger budget
        """
        decode = [Slice(sequence, 1) for sequence in self._grow()]
        left, prefill = self._cap, []
        for sequence in self._prefilling(class_point, points):
            length = min(left, sequence.to_read - sequence.cached)
            prefill.append(Slice(sequence, length))
            left -= length
            if not left:
                break
        running = [[piece for piece in pieces if piece.sequence.context] for pieces in (decode, prefill)]
        return running[0], running[1]

    def advance(self, piece: Slice, point: int) -> None:
        """A slice was run at `point`."""
        assert piece.sequence.context, "what runs has memory"
        self.pool.advance(piece.sequence.context, piece.sequence.tokens, piece.length, point)

    def unfinished_blocks(self, piece: Slice) -> list[int]:
        """Blocks that a failed slice may have spoilt; nobody else reads them."""
        assert piece.sequence.context, "what runs has memory"
        return self.pool.unfinished(piece.sequence.context)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and give its blocks back."""
        del self.running[sequence.request.request_id]
        self._release(sequence)

    def withdraw(self, request_id: str) -> None:
        """Take a request out, be it waiting or running."""
        if sequence := self.running.get(request_id):
            self.finish(sequence)
            return
        kept = [entry for entry in self._waiting if entry[1].request.request_id != request_id]
        assert len(kept) == len(self._waiting) - 1, "withdrawn requests are in flight"
        heapq.heapify(kept)
        self._waiting = kept

    # -- memory -------------------------------------------------------------------------------------------------

    def _grow(self) -> list[Sequence]:
        """The decoding sequences, each with room for its next token. Preempts from the lowest rank on."""
        decoding = [sequence for sequence in self.running.values() if not sequence.prefilling]
        for sequence in sorted(decoding, key=lambda sequence: sequence.rank):
            while sequence.context and not self.pool.can_grow(sequence.context):
                self._preempt(self._lowest())
            if sequence.context:
                self.pool.grow(sequence.context)
        return [sequence for sequence in decoding if sequence.context]

    def _prefilling(self, class_point: Items[int], points: int) -> Iterator[Sequence]:
        yield from [sequence for sequence in self.running.values() if sequence.prefilling]
        while self._waiting:
            head = self._waiting[0][1]
            if not self._start(head, class_point, points):
                return
            yield head

    def _start(self, head: Sequence, class_point: Items[int], points: int) -> bool:
        """Run the first of the queue, if need be instead of sequences of lower priority. False if it has to wait."""
        own = class_point[head.request.service_class]
        known = self.pool.prefixes.match(head.tokens, range(own, points))
        readers = [one for one in self.running.values() if one.prefilling]
        if any(
            class_point[one.request.service_class] >= own and _common_blocks(one.tokens, head.tokens) > len(known)
            for one in readers
        ):
            return False  # soon more of it will be known than now
        while len(self.running) == self._max_sequences or not self.pool.can_open(
            len(head.tokens), known, spare=len(self.running)
        ):
            lowest = self._lowest() if self.running else None
            if lowest is None or lowest.request.priority >= head.request.priority:
                return False
            self._preempt(lowest)
        heapq.heappop(self._waiting)
        head.context = self.pool.open(len(head.tokens), known)
        if not head.to_read:
            self.counts.prompt_tokens += len(head.tokens)
            self.counts.prompt_tokens_known += head.cached
        head.to_read = len(head.tokens)
        self.running[head.request.request_id] = head
        return True

    def _lowest(self) -> Sequence:
        return max(self.running.values(), key=lambda sequence: sequence.rank)

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence.request.request_id]
        self._release(sequence)
        self._wait(sequence)
        self.counts.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.context, "what runs has memory"
        self.pool.close(sequence.context)
        sequence.context = None

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.rank, sequence))


def _common_blocks(reading: Items[int], waiting: Items[int]) -> int:
    """Complete blocks that the prompt being read will share with a waiting one."""
    most = min(len(reading) // BLOCK_TOKENS, (len(waiting) - 1) // BLOCK_TOKENS)
    for index in range(most):
        span = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        if reading[span] != waiting[span]:
            return index
    return most
