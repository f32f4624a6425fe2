"""In which order a pod's waiting requests start."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_operator.simulate.workload import SimRequest

FAIR = 8
"""One start in so many goes by priority and arrival alone: to be late is not to be forgotten."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What decides which of a class's requests start before others'. Without an objective `ttft_s` is infinite."""

    priority: int
    ttft_s: float


def by_deadline(
    waiting: Sequence[SimRequest],
    promises: Mapping[str, Promise],
    alone_s: Callable[[SimRequest], float],
    starts: int,
    now_s: float,
) -> int:
    """Place of the next of at least one waiting request, as `Slack.first` of prism_runtime.engine.batching has it.

    alone_s  how long a request's prompt takes by itself
    starts   requests that have started so far
    """
    if starts % FAIR == FAIR - 1:
        return min(range(len(waiting)), key=lambda place: (-promises[waiting[place].service_class].priority, place))

    def urgency(place: int) -> tuple[int, bool, float, int]:
        """By priority, then those whose first token can still be in time, then by deadline."""
        request = waiting[place]
        promise = promises[request.service_class]
        if request.first_s is not None:
            return (-promise.priority, False, -math.inf, place)
        due_s = request.arrived_s + promise.ttft_s
        return (-promise.priority, due_s < now_s + alone_s(request), due_s, place)

    return min(range(len(waiting)), key=urgency)
