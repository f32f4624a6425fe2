"""Who runs in the next step, and with what memory; who of them at which operating point is the policy's to say.

Requests rank by priority (higher first), then arrival. Whom the policy names first is not overtaken: letting small
requests pass while it waits for memory would starve it under load. Memory is taken as sequences grow, not when they
start; if there is none left, the running sequence of the lowest rank gives up its own, waits, and computes it again
later. The sequence of the highest rank is therefore never stopped, so everything ends.
"""

import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from prism_runtime.engine.backlog import Backlog
from prism_runtime.engine.batching import Arrangement, Outlook, Policy
from prism_runtime.engine.blocks import BlockPool
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.sequence import Sequence, Slice
from prism_runtime.engine.types import Request


@dataclass(slots=True)
class Counts:
    """Since the start. Tokens of prompts when first started, and how many of them were not computed again."""

    preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_known: int = 0


class Scheduler:
    """Owns the queue, the running sequences and their memory. One thread calls it.

    A request's longest context must fit the pool, else it could wait for ever.
    """

    def __init__(
        self, pool: BlockPool, max_sequences: int, prefill_tokens_per_step: int, seed: int, policy: Policy, points: int
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.running: dict[str, Sequence] = {}
        self.counts = Counts()
        self.backlog = Backlog()
        self._waiting: dict[str, Sequence] = {}
        self._max_sequences = max_sequences
        self._cap = prefill_tokens_per_step
        self._points = points
        self._arrivals = self._starts = 0
        self._seeds = random.Random(seed)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enqueue(self, request: Request, now_s: float) -> None:
        seed = request.sampling.seed
        draws = random.Random(self._seeds.getrandbits(64) if seed is None else seed)
        rank = (-request.priority, self._arrivals)
        self._waiting[request.request_id] = Sequence(request, rank, now_s, list(request.prompt), draws)
        self._arrivals += 1

    def schedule(self, class_point: Items[int], now_s: float) -> tuple[list[Slice], list[Slice]]:
        """(decode, prefill) slices of the next step; starts waiting requests while the prefill cap lasts.

        class_point  operating point of each service class: a request may begin with keys and values that were computed
                     at its own point or a larger budget
        """
        step = self._arrange(class_point, now_s)
        decode = [Slice(sequence, 1, step.point_of(sequence)) for sequence in step.decode]
        left, prefill = step.most_read, []
        for sequence in self._prefilling(step, now_s):
            length = min(left, sequence.to_read - sequence.cached)
            prefill.append(Slice(sequence, length, step.point_of(sequence)))
            left -= length
            if not left:
                break
        # Whoever was stopped in favour of another has no memory now.
        running = [[piece for piece in pieces if piece.sequence.context] for pieces in (decode, prefill)]
        return running[0], running[1]

    def _arrange(self, class_point: Items[int], now_s: float) -> Arrangement:
        decoding = self._grow()
        outlook = Outlook(
            now_s=now_s,
            decoding=decoding,
            reading=self._readers(),
            waiting=self._waiting.values(),
            free=self._max_sequences - len(self.running),
            top=lambda sequence: class_point[sequence.request.service_class],
            most_read=self._cap,
        )
        step = self.policy.arrange(outlook)
        self.backlog = Backlog.of(
            decoding, outlook.reading, outlook.waiting, outlook.free, outlook.most_read, step.floor_s
        )
        return step

    def advance(self, piece: Slice) -> None:
        """A slice was run."""
        assert piece.sequence.context, "what runs has memory"
        self.pool.advance(piece.sequence.context, piece.sequence.tokens, piece.length, piece.point)

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
        del self._waiting[request_id]

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

    def _readers(self) -> list[Sequence]:
        readers = [sequence for sequence in self.running.values() if sequence.prefilling]
        return sorted(readers, key=lambda sequence: sequence.rank)

    def _prefilling(self, step: Arrangement, now_s: float) -> Iterator[Sequence]:
        yield from [sequence for sequence in self._readers() if step.reads(sequence)]
        while could_start := [sequence for sequence in self._waiting.values() if step.reads(sequence)]:
            first = self.policy.first(could_start, now_s, self._starts)
            if not self._start(first, step):
                return
            yield first

    def _start(self, first: Sequence, step: Arrangement) -> bool:
        """Run a waiting request, if need be instead of sequences of lower priority. False if it has to wait."""
        own = step.point_of(first)
        known = self.pool.prefixes.match(first.tokens, range(own, self._points))
        if any(
            step.point_of(one) >= own and _common_blocks(one.tokens, first.tokens) > len(known)
            for one in self._readers()
        ):
            return False  # soon more of it will be known than now
        while len(self.running) == self._max_sequences or not self.pool.can_open(
            len(first.tokens), known, spare=len(self.running)
        ):
            lowest = self._lowest() if self.running else None
            if lowest is None or lowest.request.priority >= first.request.priority:
                return False
            self._preempt(lowest)
        del self._waiting[first.request.request_id]
        self._starts += 1
        first.context = self.pool.open(len(first.tokens), known)
        if not first.to_read:
            self.counts.prompt_tokens += len(first.tokens)
            self.counts.prompt_tokens_known += first.cached
        first.to_read = len(first.tokens)
        self.running[first.request.request_id] = first
        return True

    def _lowest(self) -> Sequence:
        return max(self.running.values(), key=lambda sequence: sequence.rank)

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence.request.request_id]
        self._release(sequence)
        self._waiting[sequence.request.request_id] = sequence
        self.counts.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.context, "what runs has memory"
        self.pool.close(sequence.context)
        sequence.context = None


def _common_blocks(reading: Items[int], waiting: Items[int]) -> int:
    """Complete blocks that the prompt being read will share with a waiting one."""
    most = min(len(reading) // BLOCK_TOKENS, (len(waiting) - 1) // BLOCK_TOKENS)
    for index in range(most):
        span = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        if reading[span] != waiting[span]:
            return index
    return most
