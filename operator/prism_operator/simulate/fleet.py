"""The pool: arrivals, routing, pod starts and ends, and the channel to whatever controls it. One service.

Every random thing has a stream of its own, seeded from one seed, so that two policies meet the same world: the n-th pod
that is ever started takes equally long under both.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from prism_api.control import Admission, Fence, Load
from prism_api.profile import Profile
from prism_operator.plan.types import Observation, PodView, ServicePolicy
from prism_operator.simulate.control import Controller, Orders, PodSignals, Prism, Signals, Tick
from prism_operator.simulate.counters import Counters, total
from prism_operator.simulate.engine import SimPod
from prism_operator.simulate.engine_model import EngineModel
from prism_operator.simulate.governor import PodGovernor
from prism_operator.simulate.order import Promise
from prism_operator.simulate.workload import SimRequest
from prism_operator.simulate.world import StartTime, World

KV_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool at one controller tick, for plots and integrals."""

    at_s: float
    ready: int
    provisioned: int
    existing: int
    """Provisioned, and those that still drain: what is paid for."""
    backlog: int
    points: tuple[str, ...]
    """Of each class, as last ordered for all pods."""


@dataclass(slots=True)
class Lost:
    """Requests that were never answered, by class."""

    shed: dict[str, int] = field(default_factory=dict)
    """Refused: by a controller's order, or with no pod ready."""
    broken: dict[str, int] = field(default_factory=dict)
    """Accepted, and lost with a pod."""


class Fleet:
    """A pool under a controller. Without one, Prism decides by `policy`.

    `start_s` gives the start time of the n-th pod, None for one that never becomes ready; the first `pods` are ready.
    """

    def __init__(
        self,
        policy: ServicePolicy,
        profile: Profile,
        pods: int = 1,
        start_s: StartTime = lambda n: 15.0,
        controller: Controller | None = None,
        world: World | None = None,
    ) -> None:
        self.policy, self.profile, self.start_s = policy, profile, start_s
        self.world = world or World(step_noise=0.0)
        self.controller = controller or Prism(policy)
        self.now_s = 0.0
        self.ordered = pods
        self.pods: list[SimPod] = []
        self.finished: list[SimRequest] = []
        self.lost = Lost()
        self.samples: list[Sample] = []
        self.preemptions = 0
        self.pod_seconds = 0.0
        """Of all pods that existed so far."""
        self._counted_s = 0.0
        names = [one.name for one in policy.classes]
        quality = {point.name: float(point.relative_quality) for point in policy.ladder.points}
        promises = {one.name: Promise(one.priority, one.ttft_s or math.inf) for one in policy.classes}
        by_deadline = promises if self.world.by_deadline else None
        self._model = EngineModel.of(profile, names, quality, self.world.step_noise, by_deadline)
        self._objectives = {one.name: (one.ttft_s or math.inf, one.tpot_s or math.inf) for one in policy.classes}
        self._gateway = {name: Counters() for name in names}
        """Requests that no pod counted, because none was ready."""
        self._admission = dict.fromkeys(names, Admission.ACCEPT)
        self._points = dict.fromkeys(names, "full")
        self._ready_times: list[float] = []
        self._ready: list[SimPod] = []
        self._out: frozenset[str] = frozenset()
        """Ready pods that a controller took out of traffic."""
        self._routable: list[SimPod] = []
        self._missed_polls: dict[str, int] = {}
        self._views: dict[str, PodView] = {}
        """Of each pod, what its last report that was heard said."""
        self._marks: dict[str, tuple[int, float]] = {}
        """Steps and busy seconds of each pod at the last tick."""
        self._first_tokens: list[tuple[float, float]] = []
        self._predictions: list[tuple[float, float]] = []
        self._offered = 0
        self._sequence = 0
        self._arrivals: deque[SimRequest] = deque()
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._losses = self.world.stream("reports")
        self._failures = self.world.stream("failures")
        self._routing = self.world.stream("routing")
        for _ in range(pods):
            self._add_pod(ready_s=0.0)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[SimRequest], until_s: float) -> None:
        """Play the requests, with controller ticks, up to and including `until_s`; can be called again to go on."""
        self._arrivals = deque(heapq.merge(self._arrivals, sorted(requests, key=_arrived), key=_arrived))
        if not self.samples:
            self._at(self.now_s, self._tick)
        # Arrivals do not go through the queue of events: there are as many as of all others together.
        arrivals, events = self._arrivals, self._events
        while True:
            at_s = events[0][0]
            if arrivals and arrivals[0].arrived_s <= min(at_s, until_s):
                request = arrivals.popleft()
                self.now_s = request.arrived_s
                self._arrive(request)
            elif at_s <= until_s:
                self.now_s, _, event = heapq.heappop(events)
                event()
            else:
                break
        self.now_s = until_s
        self._count_pod_seconds()

    @property
    def outstanding(self) -> int:
        """Requests accepted and not ended."""
        return sum(pod.outstanding for pod in self.pods)

    def restart_operator(self) -> None:
        """Forget everything that the operator remembers; pods run on."""
        assert isinstance(self.controller, Prism), "only Prism is restarted"
        self.controller.forget()

    def lose(self, name: str) -> None:
        """A pod vanishes; its requests are lost with it, and its replacement starts."""
        for pod in self.pods:
            if pod.name == name:
                self._crash(pod)

    @property
    def ticks(self) -> list[Tick]:
        assert isinstance(self.controller, Prism), "only Prism keeps its plans"
        return self.controller.ticks

    @property
    def shed(self) -> int:
        return sum(self.lost.shed.values())

    def attainment(self) -> float:
        """Share of all requests that ended which met every objective of their class."""
        met = sum(self.is_met(request) for request in self.finished)
        ended = len(self.finished) + self.shed + sum(self.lost.broken.values())
        return met / ended if ended else 1.0

    def points(self, name: str = "interactive") -> list[tuple[float, str]]:
        return [(tick.at_s, tick.plan.by_name(name).point) for tick in self.ticks if tick.plan.classes]

    def is_met(self, request: SimRequest) -> bool:
        ttft_s, tpot_s = self._objectives[request.service_class]
        mine = request.tpot_s
        return request.ttft_s <= ttft_s and (mine is None or mine <= tpot_s)

    # -- pods ---------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _add_pod(self, ready_s: float | None = None) -> None:
        self._count_pod_seconds()
        number = next(self._numbers)
        fate = self.world.stream(f"pod/{number}")
        if ready_s is None:
            takes_s = None if fate.random() < self.world.never_ready else self.start_s(number)
            ready_s = None if takes_s is None else self.now_s + takes_s
        full = dict.fromkeys(self._points, "full")
        pod = SimPod(
            name=f"pod-{number}",
            number=number,
            created_s=self.now_s,
            ready_s=ready_s,
            model=self._model,
            points=full,
            noise=self.world.stream(f"noise/{number}"),
            slow=self.world.slow_factor if fate.random() < self.world.slow_pods else 1.0,
            governor=PodGovernor(self.policy, full, self.now_s) if self.world.governors else None,
        )
        self.pods.append(pod)
        if ready_s is not None:
            if ready_s <= self.now_s:
                self._become_ready(pod)
            else:
                self._at(ready_s, lambda: self._become_ready(pod))

    def _become_ready(self, pod: SimPod) -> None:
        if pod.stopping or pod.gone:
            return
        self._ready.append(pod)
        self._route()
        if pod.created_s < self.now_s:
            self._ready_times.append(self.now_s - pod.created_s)
        if self.world.crashes_per_hour:
            lives_s = self._failures.expovariate(self.world.crashes_per_hour / 3600)
            self._at(self.now_s + lives_s, partial(self._crash, pod))

    def _crash(self, pod: SimPod) -> None:
        if pod.gone:
            return
        for request in pod.crash():
            broken = self.lost.broken
            broken[request.service_class] = broken.get(request.service_class, 0) + 1
        self._forget(pod)
        self._scale()

    def _count_pod_seconds(self) -> None:
        """To be called before the number of pods changes."""
        self.pod_seconds += len(self.pods) * (self.now_s - self._counted_s)
        self._counted_s = self.now_s

    def _forget(self, pod: SimPod) -> None:
        self._count_pod_seconds()
        pod.gone = True
        self.preemptions += pod.preemptions
        self.pods.remove(pod)
        if pod in self._ready:
            self._ready.remove(pod)
            self._route()

    def _scale(self) -> None:
        kept = [pod for pod in self.pods if not pod.stopping]
        for _ in range(self.ordered - len(kept)):
            self._add_pod()
        # As a ReplicaSet does: pods that are not ready first, then those of the lowest deletion cost, then the newest.
        doomed = sorted(
            kept, key=lambda pod: (pod.ready(self.now_s), pod.name not in self._out, -pod.created_s, -pod.number)
        )
        for pod in doomed[: max(0, len(kept) - self.ordered)]:
            pod.stopping = True
            if pod in self._ready:
                self._ready.remove(pod)
                self._route()
            self._at(self.now_s + self.world.drain_s, partial(self._crash, pod))
        for pod in [pod for pod in self.pods if pod.stopping and not pod.outstanding]:
            self._forget(pod)

    def _route(self) -> None:
        self._routable = [pod for pod in self._ready if pod.name not in self._out]

    # -- requests -----------------------------------------------------------------------------------------------

    def _arrive(self, request: SimRequest) -> None:
        name = request.service_class
        self._offered += 1
        pod = self._chosen()
        counters = self._gateway[name] if pod is None else pod.counters[name]
        counters.arrived += 1
        counters.prompt_tokens += request.prompt_tokens
        if pod is None or self._admission[name] is Admission.SHED:
            counters.shed += 1
            self.lost.shed[name] = self.lost.shed.get(name, 0) + 1
            return
        if self.controller.wants_predictions:
            self._predictions.append((self.now_s, pod.predicted_ttft_s(request, self.now_s)))
        if pod.submit(request, self.now_s):
            self._wake(pod)

    def _chosen(self) -> SimPod | None:
        if self.world.random_routing and self._routable:
            return self._routing.choice(self._routable)
        return min(self._routable, key=_outstanding, default=None)

    def _wake(self, pod: SimPod) -> None:
        at_s, version = pod.wake_s, pod.version
        if at_s is not None:
            self._at(at_s, lambda: self._advance(pod, version))

    def _advance(self, pod: SimPod, version: int) -> None:
        if pod.gone or pod.version != version:
            return
        pod.advance(self.now_s)
        if pod.first_tokens:
            self._first_tokens += [(self.now_s, request.ttft_s) for request in pod.first_tokens]
            pod.first_tokens.clear()
        if pod.finished:
            for request in pod.finished:
                pod.counters[request.service_class].judged(request, met=self.is_met(request))
            self.finished += pod.finished
            pod.finished.clear()
        if pod.stopping and not pod.outstanding:
            self._forget(pod)
        else:
            self._wake(pod)

    # -- control ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        signals = self._signals()
        lag_s = self.world.report_lag_s
        if lag_s:
            self._at(self.now_s + lag_s, lambda: self._follow(self.controller.decide(signals)))
        else:
            self._follow(self.controller.decide(signals))
        self._at(self.now_s + self.controller.period_s, self._tick)

    def _follow(self, orders: Orders) -> None:
        if orders.out_of_traffic is not None and orders.out_of_traffic != self._out:
            self._out = orders.out_of_traffic
            self._route()
        if orders.replicas is not None:
            self.ordered = orders.replicas
        self._scale()
        self._admission.update(orders.admission)
        self._points.update(orders.points)
        self._sequence += 1
        if orders.points or orders.pod_points:
            fence = Fence(epoch=1, sequence=self._sequence)
            self._at(self.now_s + self.world.directive_lag_s, lambda: self._direct(orders, fence))

    def _direct(self, orders: Orders, fence: Fence) -> None:
        for pod in self._ready:
            own = orders.pod_points.get(pod.name)
            points = orders.points if own is None else dict.fromkeys(self._points, own)
            pod.held = fence
            if pod.set_points(points, self.now_s, orders.floors):
                self._wake(pod)

    def _signals(self) -> Signals:
        for pod in self.pods:
            pod.settle(self.now_s)
        self.samples.append(
            Sample(
                at_s=self.now_s,
                ready=len(self._ready),
                provisioned=sum(not pod.stopping for pod in self.pods),
                existing=len(self.pods),
                backlog=sum(len(pod.waiting) for pod in self.pods),
                points=tuple(self._points.values()),
            )
        )
        signals = Signals(
            now_s=self.now_s,
            observation=self._observe() if self.controller.wants_reports else None,
            pods=[self._metrics(pod) for pod in self._ready],
            provisioned=self.samples[-1].provisioned,
            first_tokens=self._first_tokens,
            predictions=self._predictions,
            offered=self._offered,
        )
        self._first_tokens, self._predictions, self._offered = [], [], 0
        return signals

    def _metrics(self, pod: SimPod) -> PodSignals:
        before_steps, before_s = self._marks.get(pod.name, (0, 0.0))
        self._marks[pod.name] = (pod.steps, pod.busy_s)
        steps, busy_s = pod.steps - before_steps, pod.busy_s - before_s
        return PodSignals(
            name=pod.name,
            running=pod.running,
            waiting=len(pod.waiting),
            token_s=busy_s / steps if steps else None,
            oldest_wait_s=self.now_s - pod.waiting[0].arrived_s if pod.waiting else 0.0,
            kv_used=pod.kv_used / self._model.kv_tokens,
            waiting_prompt_tokens=sum(request.prompt_tokens - request.prefilled for request in pod.waiting),
            age_s=self.now_s - (pod.ready_s or 0.0),
        )

    def _observe(self) -> Observation:
        """Pods whose report is lost keep counting; their next one covers both ticks."""
        heard = [pod for pod in self._ready if self._is_heard(pod)]
        draining = [pod for pod in self.pods if pod.stopping]
        names = self._gateway
        grown = {}
        if heard:
            for name in names:
                sources = [pod.counters[name] for pod in (*heard, *draining)]
                grown[name] = total([*sources, self._gateway[name]])
                for pod in (*heard, *draining):
                    pod.counters[name] = Counters()
                self._gateway[name] = Counters()
        return Observation(
            now_s=self.now_s,
            pods=tuple(self._view(pod) for pod in self.pods),
            classes=grown,
            ordered_replicas=self.ordered,
            pod_ready_times_s=tuple(self._ready_times[-10:]),
        )

    def _is_heard(self, pod: SimPod) -> bool:
        lost = bool(self.world.report_loss) and self._losses.random() < self.world.report_loss
        self._missed_polls[pod.name] = self._missed_polls.get(pod.name, 0) + 1 if lost else 0
        return not lost

    def _view(self, pod: SimPod) -> PodView:
        missed = self._missed_polls.get(pod.name, 0)
        ready = pod.ready(self.now_s)
        if missed and ready and pod.name in self._views:
            stale = missed >= self.policy.loop.missed_polls
            return replace(self._views[pod.name], stale=stale, serving=pod.name not in self._out)
        view = self._fresh_view(pod, ready)
        self._views[pod.name] = view
        return view

    def _fresh_view(self, pod: SimPod, ready: bool) -> PodView:
        return PodView(
            name=pod.name,
            uid=pod.name,
            created_s=pod.created_s,
            ready=ready,
            ready_s=pod.ready_s if ready else None,
            serving=pod.name not in self._out,
            deleting=pod.stopping,
            stale=not ready or self._missed_polls.get(pod.name, 0) > 0,
            held=pod.held,
            points=dict(pod.points) if ready else {},
            load=self._load(pod) if ready else None,
            profile=self.profile if ready else None,
        )

    def _load(self, pod: SimPod) -> Load:
        return Load(
            running=pod.running,
            waiting=len(pod.waiting),
            kv_blocks=max(1, self._model.kv_tokens // KV_BLOCK_TOKENS),
            kv_blocks_used=min(pod.kv_used, self._model.kv_tokens) // KV_BLOCK_TOKENS,
            preemptions=pod.preemptions,
        )


def _arrived(request: SimRequest) -> float:
    return request.arrived_s


def _outstanding(pod: SimPod) -> int:
    return pod.outstanding
