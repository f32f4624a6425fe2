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
        return min(range(len(waiting)), key=lambda place: _rank(promises, waiting[place]))

    def urgency(request: SimRequest) -> tuple[int, bool, float, float]:
        """By priority, then those whose first token can still be in time, then by deadline."""
        priority, arrived_s = _rank(promises, request)
        if request.first_s is not None:
            return (priority, False, -math.inf, arrived_s)
        due_s = arrived_s + promises[request.service_class].ttft_s
        late = due_s < math.inf and due_s < now_s + alone_s(request)
        return (priority, late, due_s, arrived_s)

    return min(range(len(waiting)), key=lambda place: urgency(waiting[place]))


def _rank(promises: Mapping[str, Promise], request: SimRequest) -> tuple[int, float]:
    return (-promises[request.service_class].priority, request.arrived_s)
