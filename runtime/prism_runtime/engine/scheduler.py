"""Who runs in the next step: every decoding sequence, and as much of the waiting prompts as the step's cap allows.

Waiting requests are ordered by priority (higher first), then arrival, and are never dropped. The head of the queue is
not overtaken: letting small requests pass while it waits for memory would starve it under load.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from prism_runtime.engine.cache import BlockBudget
from prism_runtime.engine.types import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request. `cached` of its `tokens` (prompt, then generated) are in the cache slot `slot`."""

    request: Request
    slot: int
    tokens: list[int] = field(repr=False)
    draws: random.Random = field(repr=False)
    cached: int = 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        return self.cached < len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` tokens of a sequence, from the first that is not cached, to run in this step."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """True if the slice ends with the sequence's last token, so that its logits give the next one."""
        return self.sequence.cached + self.length == len(self.sequence.tokens)


def context_tokens(request: Request) -> int:
    """The longest context a request can reach. Its last token is never run, but counting it keeps the rule simple."""
    return len(request.prompt) + request.sampling.max_tokens


class Scheduler:
    """Owns the queue, the running sequences and their memory. One thread calls it."""

    def __init__(self, budget: BlockBudget, prefill_tokens_per_step: int, seed: int) -> None:
        self.budget = budget
        self.running: dict[str, Sequence] = {}
        self._cap = prefill_tokens_per_step
        self._waiting: list[tuple[int, int, Request]] = []
        self._arrivals = 0
        self._seeds = random.Random(seed)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enqueue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (-request.priority, self._arrivals, request))
        self._arrivals += 1

    def schedule(self) -> tuple[list[Slice], list[Slice]]:
        """(decode, prefill) slices of the next step; admits waiting requests while the prefill cap lasts."""
        decode = [Slice(sequence, 1) for sequence in self.running.values() if not sequence.prefilling]
        left, prefill = self._cap, []
        for sequence in self._prefilling():
            length = min(left, len(sequence.request.prompt) - sequence.cached)
            prefill.append(Slice(sequence, length))
            left -= length
            if not left:
                break
        return decode, prefill

    def _prefilling(self) -> Iterator[Sequence]:
        yield from [sequence for sequence in self.running.values() if sequence.prefilling]
        while self._can_admit_head():
            yield self._admit_head()

    def _can_admit_head(self) -> bool:
        return bool(self._waiting) and self.budget.can_admit(context_tokens(self._waiting[0][2]))

    def _admit_head(self) -> Sequence:
        request = heapq.heappop(self._waiting)[2]
        seed = request.sampling.seed
        draws = random.Random(self._seeds.getrandbits(64) if seed is None else seed)
        slot = self.budget.admit(context_tokens(request))
        sequence = Sequence(request, slot, list(request.prompt), draws)
        self.running[request.request_id] = sequence
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its slot and blocks."""
        del self.running[sequence.request.request_id]
        self.budget.release(sequence.slot)

    def withdraw(self, request_id: str) -> None:
        """Take a request out, be it waiting or running."""
        if sequence := self.running.get(request_id):
            self.finish(sequence)
            return
        kept = [entry for entry in self._waiting if entry[2].request_id != request_id]
        assert len(kept) == len(self._waiting) - 1, "withdrawn requests are in flight"
        heapq.heapify(kept)
        self._waiting = kept
