"""One simulated pod: continuous batching with chunked prefill at the step times of a profile.

A step decodes one token of every running sequence and prefills waiting prompts up to the chunk; a prompt's last chunk
gives its first token. Prompts are admitted in order while sequences and KV tokens last: in that of arrival, or of
deadlines where the model has promises. When running sequences outgrow the KV cache the youngest is preempted and
computed again later, as vLLM does. A new operating point holds from the next step on.

Steps without prefill differ only by the growth of the context, so a whole run of them is one event: its length is the
sum of an arithmetic series. A run is cut short at the end of the current step when a prompt can join or the point
changes. Exact, and independent of the number of tokens: this is what makes a simulation of 100 pods cheap.

Classes with points of their own share a batch: each pays for its own sequences and context, all for the costliest base,
because a batch touches the union of its sequences' sub-experts (the assumption of `plan.capacity`).
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_api.control import Fence
from prism_operator.simulate import order
from prism_operator.simulate.counters import Counters
from prism_operator.simulate.engine_model import EngineModel, PointCost
from prism_operator.simulate.governor import PodGovernor
from prism_operator.simulate.workload import SimRequest

_NO_FLOORS: Mapping[str, str] = {}


def erlang_p90(count: int) -> float:
    """90 % quantile of the time until the `count`-th event of a Poisson process of rate 1 (Wilson and Hilferty)."""
    return count * (1 - 1 / (9 * count) + 1.2815515594 / (3 * math.sqrt(count))) ** 3


@dataclass(slots=True)
class _Run:
    """Steps in progress: step i takes first_s + i * growth_s; `prefill` only if there is one step."""

    start_s: float
    steps: int
    first_s: float
    growth_s: float
    prefill: list[tuple[SimRequest, int]]

    def lasts_s(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    @property
    def end_s(self) -> float:
        return self.start_s + self.lasts_s(self.steps)

    def completed(self, now_s: float) -> int:
        """Steps that have ended by `now_s`."""
        elapsed = now_s - self.start_s
        if elapsed <= 0:
            return 0
        if elapsed >= self.lasts_s(self.steps):
            return self.steps
        if self.growth_s <= 0:
            return min(self.steps, int(elapsed / self.first_s + 1e-9))
        middle = self.first_s - self.growth_s / 2
        root = (math.sqrt(middle * middle + 2 * self.growth_s * elapsed) - middle) / self.growth_s
        return min(self.steps, int(root + 1e-9))


@dataclass(slots=True)
class SimPod:
    """A pod and its engine. `wake_s` is when `advance` must be called next; None while idle.

    ready_s   None: it never becomes ready
    slow      factor on every step: a pod on a bad node
    governor  moves the pod's points between two orders; None: it stays where it is told to be
    gone      crashed, or drained and deleted
    """

    name: str
    number: int
    created_s: float
    ready_s: float | None
    model: EngineModel
    points: dict[str, str]
    noise: random.Random
    slow: float = 1.0
    governor: PodGovernor | None = None
    stopping: bool = False
    gone: bool = False
    outstanding: int = 0
    preemptions: int = 0
    held: Fence | None = None
    waiting: deque[SimRequest] = field(default_factory=deque)
    counters: dict[str, Counters] = field(default_factory=dict)
    finished: list[SimRequest] = field(default_factory=list)
    """Whole answers since the fleet last took them."""
    first_tokens: list[SimRequest] = field(default_factory=list)
    """Requests that got their first token since the fleet last took them."""
    steps: int = 0
    busy_s: float = 0.0
    version: int = 0
    """Counts changes of `wake_s`: an event of an older version is void."""
    _ordered: dict[str, str] = field(default_factory=dict)
    """Points from the next step on."""
    _costs: dict[str, PointCost] = field(default_factory=dict)
    """Of each class at its point in `points`."""
    _ends: list[tuple[int, int, SimRequest]] = field(default_factory=list)
    """Heap of (step after which it ends, order of joining, request)."""
    _joined: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By identity of a running request: steps and quality sum of the pod when it joined."""
    _orders: int = 0
    _active: dict[str, int] = field(default_factory=dict)
    _context: dict[str, int] = field(default_factory=dict)
    _quality: dict[str, float] = field(default_factory=dict)
    """Sum of relative quality over all steps so far, by class."""
    _starts: int = 0
    """Requests that began their prefill."""
    _partial: int = 0
    """KV tokens of the prompt in the middle of its prefill."""
    _run: _Run | None = None

    def __post_init__(self) -> None:
        self._ordered = self.points
        self._take_points()
        for name in self.model.classes:
            self.counters[name] = Counters()
            self._active[name] = 0
            self._context[name] = 0
            self._quality[name] = 0.0

    # -- questions ----------------------------------------------------------------------------------------------

    def ready(self, now_s: float) -> bool:
        return self.ready_s is not None and self.ready_s <= now_s and not self.stopping and not self.gone

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def kv_used(self) -> int:
        return sum(self._context.values()) + self._partial

    @property
    def wake_s(self) -> float | None:
        return None if self._run is None else self._run.end_s

    def predicted_ttft_s(self, request: SimRequest, now_s: float) -> float:
        """90 % quantile of the TTFT of a request that would be queued now, from the counts that a pod publishes.

        With room in the cache: the step in progress, the prompts ahead and its own. Without: until as many sequences
        have ended as wait, and one more; a predictor does not know when each one ends, so their ends are Poisson.
        """
        cost = self._costs[request.service_class]
        ahead = sum(waiting.prompt_tokens - waiting.prefilled for waiting in self.waiting)
        prefill_s = cost.base_s + cost.prefill_s + cost.prefill_token_s * (ahead + request.prompt_tokens)
        run = self._run
        if run is None:
            return prefill_s
        if not self._ends or self._can_admit(self.waiting[0] if self.waiting else request):
            return run.start_s + run.first_s - now_s + prefill_s
        tokens = sum(one.output_tokens for _, _, one in self._ends) / len(self._ends)
        interval_s = tokens * run.first_s / len(self._ends)
        return erlang_p90(len(self.waiting) + 1) * interval_s + prefill_s

    # -- acts ---------------------------------------------------------------------------------------------------

    def submit(self, request: SimRequest, now_s: float) -> bool:
        """Queue a request; True if `wake_s` changed."""
        self.waiting.append(request)
        self.outstanding += 1
        if self._run is None:
            self._begin(now_s)
            return True
        # Only the head of the queue can be admitted: a queue that waits already is not helped by one more.
        return len(self.waiting) == 1 and self._can_admit(request) and self._cut(now_s)

    def set_points(self, points: Mapping[str, str], now_s: float, floors: Mapping[str, str] = _NO_FLOORS) -> bool:
        """Take new points from the next step on; True if `wake_s` changed. `floors`: how far a governor may sink."""
        ordered = {**self.points, **points}
        if self.governor is not None:
            self.settle(now_s)
            self.governor.order(points, floors, now_s)
            ordered = self.governor.points
        if ordered == self._ordered:
            return False
        self._ordered = ordered
        if self._run is not None:
            return self._cut(now_s)
        self._take_points()
        return False

    def settle(self, now_s: float) -> None:
        """Count the steps that have ended by `now_s`, so that counters are true at that time."""
        self._settle(now_s)
        if self._run is None and self.governor is not None:
            self.governor.idle_until(now_s)
            self._ordered = self.governor.points
            self._take_points()

    def advance(self, now_s: float) -> None:
        """End the run in progress, which is due, and begin the next."""
        run = self._run
        assert run is not None, f"{self.name} is idle"
        self._settle(now_s)
        self._run = None
        self._end_step(run, now_s)
        self._begin(now_s)

    def crash(self) -> list[SimRequest]:
        """Vanish with all requests; they are returned."""
        joining = [] if self._run is None else [one for one, _ in self._run.prefill if not self._is_partial(one)]
        lost = [request for _, _, request in self._ends] + joining + list(self.waiting)
        self._ends, self.waiting, self._run = [], deque(), None
        self.outstanding, self.gone = 0, True
        self.version += 1
        return lost

    # -- steps --------------------------------------------------------------------------------------------------

    def _is_partial(self, request: SimRequest) -> bool:
        return request.prefilled < request.prompt_tokens + request.produced

    def _can_admit(self, request: SimRequest) -> bool:
        if request.prefilled:
            return True
        held = request.prompt_tokens + request.produced
        fits = sum(self._context.values()) + held + len(self._ends) + 1 <= self.model.kv_tokens
        return len(self._ends) < self.model.max_sequences and fits

    def _cut(self, now_s: float) -> bool:
        """End the run with the step in progress."""
        run = self._run
        assert run is not None
        self._settle(now_s)
        if run.steps <= 1:
            return False
        run.steps = 1
        self.version += 1
        return True

    def _take_points(self) -> None:
        self.points = self._ordered
        self._costs = {name: self.model.points[point] for name, point in self.points.items()}

    def _govern(self, now_s: float) -> float:
        """Let the governor move before the next step; until when it will not move again by time alone."""
        if self.governor is None:
            return math.inf
        oldest_s: dict[str, float] = {}
        for request in self.waiting:
            if request.first_s is None:
                oldest_s.setdefault(request.service_class, request.arrived_s)
        if self.governor.follow(oldest_s, now_s):
            self._ordered = self.governor.points
        return self.governor.next_s(oldest_s, now_s)

    def _begin(self, now_s: float) -> None:
        self.version += 1
        governed_s = self._govern(now_s)
        if self.points is not self._ordered:
            self._take_points()
        prefill, kv_left = self._prefill(now_s)
        if not prefill and not self._ends:
            self._run = None
            return
        costs = self._costs
        base = growth = variable = 0.0
        for name, active in self._active.items():
            if active:
                cost = costs[name]
                base = max(base, cost.base_s)
                growth += cost.token_s * active
                variable += cost.sequence_s * active + cost.token_s * self._context[name]
        for request, tokens in prefill:
            cost = costs[request.service_class]
            base = max(base, cost.base_s)
            variable += cost.prefill_token_s * tokens
        if prefill:
            variable += max(costs[request.service_class].prefill_s for request, _ in prefill)
        steps = 1
        if not prefill:
            steps = max(1, min(self._ends[0][0] - self.steps, kv_left // len(self._ends)))
        if governed_s < math.inf:
            steps = max(1, min(steps, math.ceil((governed_s - now_s) / (base + variable))))
        factor = self.slow
        if self.model.noise:
            # The mean of n independent factors; one draw for a run keeps the cost of a run constant.
            deviation = self.model.noise / math.sqrt(steps)
            factor *= math.exp(self.noise.gauss(-deviation * deviation / 2, deviation))
        self._run = _Run(now_s, steps, (base + variable) * factor, growth * factor, prefill)

    def _prefill(self, now_s: float) -> tuple[list[tuple[SimRequest, int]], int]:
        """Chunks of waiting prompts for the next step, and the KV tokens left after it; preempts if none are."""
        chunks: list[tuple[SimRequest, int]] = []
        left = self.model.chunk
        joining = 0
        while left and self.waiting and len(self._ends) + joining < self.model.max_sequences:
            self._bring_forward(now_s)
            request = self.waiting[0]
            if not self._can_admit_after(request, joining):
                break
            whole = request.prompt_tokens + request.produced
            self._starts += request.prefilled == 0
            taken = min(left, whole - request.prefilled)
            request.prefilled += taken
            self._partial += taken
            left -= taken
            chunks.append((request, taken))
            if request.prefilled < whole:
                break
            self.waiting.popleft()
            joining += 1
        kv_left = self.model.kv_tokens - self.kv_used
        while not chunks and len(self._ends) > 1 and kv_left < len(self._ends):
            self._preempt()
            kv_left = self.model.kv_tokens - self.kv_used
        return chunks, kv_left

    def _bring_forward(self, now_s: float) -> None:
        """Put at the head of the queue who starts next, unless the head's prompt is read in part already."""
        promises, waiting = self.model.promises, self.waiting
        if promises is None or waiting[0].prefilled:
            return
        place = order.by_deadline(waiting, promises, self._alone_s, self._starts, now_s)
        request = waiting[place]
        del waiting[place]
        waiting.appendleft(request)

    def _alone_s(self, request: SimRequest) -> float:
        """How long its prompt takes by itself."""
        cost = self._costs[request.service_class]
        return cost.base_s + cost.prefill_s + cost.prefill_token_s * request.prompt_tokens

    def _can_admit_after(self, request: SimRequest, joining: int) -> bool:
        if request.prefilled:
            return True
        held = request.prompt_tokens + request.produced
        alone = not self._ends and not joining
        return alone or self.kv_used + held + len(self._ends) + joining + 1 <= self.model.kv_tokens

    def _settle(self, now_s: float) -> None:
        """Account for the steps of the run that have ended; the rest of the run stays in progress."""
        run = self._run
        if run is None:
            return
        done = run.completed(now_s)
        if done == 0:
            return
        lasted_s = run.lasts_s(done)
        run.start_s += lasted_s
        run.first_s += done * run.growth_s
        run.steps -= done
        self.busy_s += lasted_s
        if self.governor is not None:
            self.governor.stepped([name for name, active in self._active.items() if active], lasted_s / done, done)
        self.steps += done
        for name, active in self._active.items():
            cost = self._costs[name]
            self._quality[name] += done * cost.quality
            if active:
                self._context[name] += done * active
                self.counters[name].produced(cost.name, done * active)

    def _end_step(self, run: _Run, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= self.steps:
            _, _, request = heapq.heappop(self._ends)
            self._leave(request)
            self._finish(request, now_s)
        for request, _ in run.prefill:
            if not self._is_partial(request):
                self._join(request, now_s)

    def _join(self, request: SimRequest, now_s: float) -> None:
        """A prompt is whole: its first (or next) token came with this step."""
        name = request.service_class
        whole = request.prompt_tokens + request.produced
        self._partial -= whole
        cost = self._costs[name]
        request.produced += 1
        request.quality += cost.quality
        self.counters[name].produced(cost.name, 1)
        if request.first_s is None:
            request.first_s = now_s
            self.first_tokens.append(request)
        if request.produced >= request.output_tokens:
            self._finish(request, now_s)
            return
        self._active[name] += 1
        self._context[name] += whole + 1
        self._orders += 1
        self._joined[id(request)] = (self.steps, self._quality[name])
        heapq.heappush(self._ends, (self.steps + request.output_tokens - request.produced, self._orders, request))

    def _leave(self, request: SimRequest) -> None:
        """Out of the batch: what it got there becomes its own."""
        name = request.service_class
        since, quality = self._joined.pop(id(request))
        request.produced += self.steps - since
        request.quality += self._quality[name] - quality
        self._active[name] -= 1
        self._context[name] -= request.prompt_tokens + request.produced

    def _finish(self, request: SimRequest, now_s: float) -> None:
        request.done_s = now_s
        self.outstanding -= 1
        self.finished.append(request)

    def _preempt(self) -> None:
        """Back to the head of the queue with the youngest sequence; its context is computed again."""
        youngest = max(self._ends, key=lambda one: one[1])
        self._ends.remove(youngest)
        heapq.heapify(self._ends)
        request = youngest[2]
        self._leave(request)
        request.prefilled = 0
        self.waiting.appendleft(request)
        self.preemptions += 1
