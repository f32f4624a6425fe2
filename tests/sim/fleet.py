"""A small event simulation of paced pods under the planner: the code that runs in the operator decides here.

Simulated: arrivals, routing to the pod with the least outstanding requests, continuous batching with chunked prefill at
the profile's step times, pod starts, directives that take effect at a step's start, counters and reports. Not
simulated: the governor inside the pod, loss or delay on the control channel, the work of Kubernetes.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prism_api.control import HISTOGRAM_BOUNDS_MS, Admission, Fence, Load, histogram_bucket
from prism_api.profile import Profile
from prism_operator.plan import budget, demand, replicas
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    ClassDelta,
    DemandState,
    Observation,
    PodView,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
)


@dataclass(slots=True)
class SimRequest:
    arrived_s: float
    service_class: str
    prompt_tokens: int
    output_tokens: int
    prefilled: int = 0
    produced: int = 0
    first_s: float | None = None
    done_s: float | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        assert self.first_s is not None
        assert self.done_s is not None
        return (self.done_s - self.first_s) / (self.produced - 1) if self.produced > 1 else None


def poisson(
    seed: int, phases: Iterable[tuple[float, float]], prompt: int = 64, output: int = 32, name: str = "interactive"
) -> list[SimRequest]:
    """Arrivals of (seconds, rate per second) phases, lengths exponential around their means."""
    arrivals, lengths = random.Random(seed), random.Random(seed + 1)
    requests, start_s = [], 0.0
    for seconds, rate in phases:
        at_s = start_s + arrivals.expovariate(rate) if rate else start_s + seconds
        while at_s < start_s + seconds:
            sizes = (max(1, round(lengths.expovariate(1 / mean))) for mean in (prompt, output))
            requests.append(SimRequest(at_s, name, *sizes))
            at_s += arrivals.expovariate(rate)
        start_s += seconds
    return requests


@dataclass(slots=True)
class SimPod:
    name: str
    created_s: float
    ready_s: float | None
    """None: it never becomes ready."""
    points: dict[str, str]
    waiting: list[SimRequest] = field(default_factory=list)
    running: list[SimRequest] = field(default_factory=list)
    stopping: bool = False
    busy: bool = False
    held: Fence | None = None

    def ready(self, now_s: float) -> bool:
        return self.ready_s is not None and self.ready_s <= now_s and not self.stopping

    @property
    def outstanding(self) -> int:
        return len(self.waiting) + len(self.running)


@dataclass(frozen=True, slots=True)
class Tick:
    """What the operator decided at one second."""

    at_s: float
    ready: int
    ordered: int
    plan: BudgetPlan
    replica_plan: ReplicaPlan | None


class Fleet:
    """One service. `start_s` gives the start time of the n-th pod, None for one that never becomes ready."""

    def __init__(
        self,
        policy: ServicePolicy,
        profile: Profile,
        pods: int = 1,
        start_s: Callable[[int], float | None] = lambda n: 15.0,
    ) -> None:
        self.policy, self.profile, self.start_s = policy, profile, start_s
        self.now_s = 0.0
        self.ordered = pods
        self.pods: list[SimPod] = []
        self.finished: list[SimRequest] = []
        self.shed = 0
        self.ticks: list[Tick] = []
        self.demand, self.budget, self.replicas = DemandState(), BudgetState(), ReplicaState()
        self._counts: dict[str, _Counts] = {one.name: _Counts() for one in policy.classes}
        self._ready_times: list[float] = []
        self._admission = dict.fromkeys(self._counts, Admission.ACCEPT)
        self._plan: BudgetPlan | None = None
        self._slow_due_s = 0.0
        self._names = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for _ in range(pods):
            self._add_pod(ready_s=0.0)

    def run(self, requests: Iterable[SimRequest], until_s: float) -> None:
        """Play the requests and tick every second; can be called again for a later `until_s`."""
        for request in requests:
            self._at(request.arrived_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        self._at(self.now_s, lambda: self._tick(until_s))
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def restart_operator(self) -> None:
        """Forget everything that the operator remembers; pods run on."""
        self.demand, self.budget, self.replicas = DemandState(), BudgetState(), ReplicaState()
        self._plan = None

    def lose(self, name: str) -> None:
        """A pod vanishes; its requests are lost with it, and its replacement starts."""
        self.pods = [pod for pod in self.pods if pod.name != name]
        self._scale()

    def attainment(self) -> float:
        met = sum(self._is_met(request) for request in self.finished)
        return met / (len(self.finished) + self.shed)

    def points(self, name: str = "interactive") -> list[tuple[float, str]]:
        return [(tick.at_s, tick.plan.by_name(name).point) for tick in self.ticks if tick.plan.classes]

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _add_pod(self, ready_s: float | None = None) -> None:
        number = next(self._names)
        if ready_s is None:
            takes_s = self.start_s(number)
            ready_s = None if takes_s is None else self.now_s + takes_s
        pod = SimPod(f"pod-{number}", self.now_s, ready_s, dict.fromkeys(self._counts, "full"))
        self.pods.append(pod)
        if ready_s is not None and ready_s > self.now_s:
            self._at(ready_s, lambda: self._ready_times.append(self.now_s - pod.created_s))

    def _scale(self) -> None:
        kept = [pod for pod in self.pods if not pod.stopping]
        for _ in range(self.ordered - len(kept)):
            self._add_pod()
        # As a ReplicaSet does: pods that are not ready go first, then the newest.
        doomed = sorted(kept, key=lambda pod: (pod.ready(self.now_s), -pod.created_s))
        for pod in doomed[: max(0, len(kept) - self.ordered)]:
            pod.stopping = True
        self.pods = [pod for pod in self.pods if not (pod.stopping and pod.outstanding == 0)]

    def _arrive(self, request: SimRequest) -> None:
        counts = self._counts[request.service_class]
        counts.arrived += 1
        counts.prompt_tokens += request.prompt_tokens
        ready = [pod for pod in self.pods if pod.ready(self.now_s)]
        if not ready or self._admission[request.service_class] is Admission.SHED:
            counts.shed += 1
            self.shed += 1
            return
        pod = min(ready, key=lambda one: (one.outstanding, one.name))
        pod.waiting.append(request)
        if not pod.busy:
            self._step(pod)

    def _step(self, pod: SimPod) -> None:
        """Begin one engine step: decode every running sequence, prefill waiting prompts up to the chunk."""
        decoding = len(pod.running)
        prefill = self._prefill(pod)
        names = {request.service_class for request in (*pod.running, *pod.waiting[:1])} or {next(iter(pod.points))}
        cost = max(self.profile.points[pod.points[name]].step_seconds(decoding, 0, prefill) for name in names)
        pod.busy = True
        point_of = dict(pod.points)
        self._at(self.now_s + cost, lambda: self._finish_step(pod, point_of))

    def _prefill(self, pod: SimPod) -> int:
        left = self.profile.prefill_tokens_per_step
        while left and pod.waiting:
            request = pod.waiting[0]
            if request.prefilled == 0 and len(pod.running) >= self.profile.max_sequences:
                break
            taken = min(left, request.prompt_tokens - request.prefilled)
            request.prefilled += taken
            left -= taken
            if request.prefilled == request.prompt_tokens:
                pod.running.append(pod.waiting.pop(0))
        return self.profile.prefill_tokens_per_step - left

    def _finish_step(self, pod: SimPod, point_of: dict[str, str]) -> None:
        for request in list(pod.running):
            counts = self._counts[request.service_class]
            request.produced += 1
            counts.output_tokens += 1
            point = point_of[request.service_class]
            counts.tokens_by_point[point] = counts.tokens_by_point.get(point, 0) + 1
            if request.first_s is None:
                request.first_s = self.now_s
            if request.produced >= request.output_tokens:
                request.done_s = self.now_s
                pod.running.remove(request)
                self._complete(request, counts)
        pod.busy = False
        if pod.outstanding:
            self._step(pod)

    def _complete(self, request: SimRequest, counts: "_Counts") -> None:
        self.finished.append(request)
        counts.finished += 1
        counts.ttft[histogram_bucket(request.ttft_s * 1000)] += 1
        if request.tpot_s is not None:
            counts.tpot[histogram_bucket(request.tpot_s * 1000)] += 1
        if self._is_met(request):
            counts.met += 1
        else:
            counts.missed += 1

    def _is_met(self, request: SimRequest) -> bool:
        objectives = self.policy.by_name(request.service_class)
        slow_first = objectives.ttft_s is not None and request.ttft_s > objectives.ttft_s
        tpot_s = request.tpot_s
        slow_rest = objectives.tpot_s is not None and tpot_s is not None and tpot_s > objectives.tpot_s
        return not (slow_first or slow_rest)

    def _tick(self, until_s: float) -> None:
        observation = self._observe()
        self.demand = demand.update(self.demand, observation, self.policy)
        plan, self.budget = budget.decide(observation, self.demand, self.policy, self.budget)
        self._direct(plan)
        replica_plan = None
        if self.now_s >= self._slow_due_s:
            self._slow_due_s = self.now_s + self.policy.loop.slow_period_s
            replica_plan, self.replicas = replicas.decide(observation, self.demand, self.policy, self.replicas)
            self.ordered = replica_plan.replicas
        self._scale()
        self.ticks.append(Tick(self.now_s, len(observation.ready), self.ordered, plan, replica_plan))
        if self.now_s + self.policy.loop.fast_period_s <= until_s:
            self._at(self.now_s + self.policy.loop.fast_period_s, lambda: self._tick(until_s))

    def _direct(self, plan: BudgetPlan) -> None:
        for target in plan.classes:
            self._admission[target.name] = target.admission
            for pod in self.pods:
                if pod.ready(self.now_s):
                    pod.points[target.name] = target.point
                    pod.held = Fence(epoch=1, sequence=len(self.ticks) + 1)

    def _observe(self) -> Observation:
        grown = {name: counts.take() for name, counts in self._counts.items()}
        return Observation(
            now_s=self.now_s,
            pods=tuple(self._view(pod) for pod in self.pods),
            classes=grown if any(pod.ready(self.now_s) for pod in self.pods) else {},
            ordered_replicas=self.ordered,
            pod_ready_times_s=tuple(self._ready_times[-10:]),
        )

    def _view(self, pod: SimPod) -> PodView:
        ready = pod.ready(self.now_s)
        load = Load(running=len(pod.running), waiting=len(pod.waiting), kv_blocks=1024, kv_blocks_used=0, preemptions=0)
        return PodView(
            name=pod.name,
            uid=pod.name,
            created_s=pod.created_s,
            ready=ready,
            ready_s=pod.ready_s if ready else None,
            deleting=pod.stopping,
            stale=not ready,
            held=pod.held,
            points=dict(pod.points) if ready else {},
            load=load if ready else None,
            profile=self.profile if ready else None,
        )


@dataclass(slots=True)
class _Counts:
    """Counters of one class since the last observation."""

    arrived: int = 0
    finished: int = 0
    met: int = 0
    missed: int = 0
    shed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: list[int] = field(default_factory=lambda: [0] * len(HISTOGRAM_BOUNDS_MS))
    tpot: list[int] = field(default_factory=lambda: [0] * len(HISTOGRAM_BOUNDS_MS))
    tokens_by_point: dict[str, int] = field(default_factory=dict)

    def take(self) -> ClassDelta:
        taken = ClassDelta(
            arrived=self.arrived,
            finished=self.finished,
            met=self.met,
            missed=self.missed,
            shed=self.shed,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft=tuple(self.ttft),
            tpot=tuple(self.tpot),
            tokens_by_point=dict(self.tokens_by_point),
        )
        fresh = _Counts()
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))
        return taken
