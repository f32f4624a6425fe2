"""How long a new request would wait, were every budget at its floor: what the door asks before it takes one in."""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from math import ceil

from prism_runtime.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Ahead:
    """A request that is not read yet: its priority, its unread tokens, and whether it runs already."""

    priority: int
    unread: int
    running: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """As of the last step.

    ahead      everything not read yet
    remaining  tokens still to come of those that decode, at most; ascending
    free       how many more could run
    most_read  prompt tokens that a step may read
    step_s     a step with every budget at its floor; None while nothing is known of costs
    """

    ahead: Items[Ahead] = ()
    remaining: Items[int] = ()
    free: int = 0
    most_read: int = 1
    step_s: float | None = None

    @classmethod
    def of(
        cls,
        decoding: Iterable[Sequence],
        reading: Iterable[Sequence],
        waiting: Collection[Sequence],
        free: int,
        most_read: int,
        step_s: float | None,
    ) -> "Backlog":
        if step_s is None:
            return cls()
        ahead = [Ahead(one.request.priority, one.unread, True) for one in reading]
        ahead += [Ahead(one.request.priority, one.unread, False) for one in waiting]
        left = sorted(one.request.sampling.max_tokens - one.generated for one in decoding)
        return cls(ahead, left, free, most_read, step_s)

    def wait_s(self, priority: int, prompt_tokens: int, others: Iterable[Ahead] = ()) -> float | None:
        """Seconds to the first token of a request that comes now and after `others`; None if nothing is known.

        It waits for those of its priority and above: until they are read, and until enough that run have ended.
        """
        if self.step_s is None:
            return None
        before = [one for one in (*self.ahead, *others) if one.running or one.priority >= priority]
        steps = ceil((sum(one.unread for one in before) + prompt_tokens) / self.most_read)
        behind = sum(not one.running for one in before) - self.free
        if behind >= 0 and self.remaining:
            steps += self.remaining[min(behind, len(self.remaining) - 1)]
        return steps * self.step_s
