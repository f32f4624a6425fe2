"""What the operator knows: one `ServiceWorld` per PrismService, written by the event loop alone, rebuilt after a start.

Facts come from two sides and at any time: records of pods and Deployments from the informers, outcomes of calls from
the channel. `observe` turns them into the planner's Observation; it is the only reader that empties something (the
counters' growth since the last observation).
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prism_api.control import Directive, Report
from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec
from prism_api.service_status import Decision
from prism_operator.control.channel import Answer, Failure, Outcome, Peer, Refused
from prism_operator.control.counters import Baseline, CountersWentBack, baseline_of, differences
from prism_operator.control.informer import DeploymentRecord, PodRecord
from prism_operator.control.resources import Object
from prism_operator.plan import demand
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
    Unusable,
)

READY_TIMES_KEPT = 10
LARGEST_EPOCH_LEAP = 1_000_000
"""A pod that claims to hold an epoch further ahead than this is not believed; else one pod could use the counter up."""

ServiceKey = tuple[str, str]
"""(namespace, name) of a PrismService."""


@dataclass(slots=True)
class PodState:
    """A pod as recorded by Kubernetes, and as it spoke last."""

    record: PodRecord
    report: Report | None = None
    reported_s: float | None = None
    baseline: Baseline | None = None
    problem: str | None = None
    """Why its last answer could not be used; None after a good one."""
    failures: int = 0
    """Calls without a good answer since the last one."""
    acknowledged_s: float | None = None
    """When it last accepted a directive; its envelope began then at the latest."""
    refusal: Refused | None = None


@dataclass(slots=True)
class ServiceWorld:
    """One service: what is asked, what there is, what was decided."""

    key: ServiceKey
    uid: str
    clock: Callable[[], float] = time.monotonic
    unix_clock: Callable[[], float] = time.time
    generation: int = 0
    spec: PrismServiceSpec | None = None
    model: PrismModelSpec | None = None
    policy: ServicePolicy | Unusable | None = None
    status: Object = field(default_factory=dict)
    """The status as last read or offered; conditions keep their transition times through it."""
    pods: dict[str, PodState] = field(default_factory=dict)
    deployment: DeploymentRecord | None = None
    demand: DemandState = field(default_factory=DemandState)
    budget: BudgetState = field(default_factory=BudgetState)
    replicas: ReplicaState = field(default_factory=ReplicaState)
    budget_plan: BudgetPlan | None = None
    replica_plan: ReplicaPlan | None = None
    directive: Directive | None = None
    """The directive in force: what every pod is to hold."""
    desired_replicas: int | None = None
    """What the Deployment is to order; None until decided or read from an existing Deployment."""
    observation: Observation | None = None
    """The last tick's, for the slow loop and the status."""
    decisions: list[Decision] = field(default_factory=list)
    """Newest first; the first ones are those of the status that was found."""
    switched_unix_s: float | None = None
    """When an operating point was last changed by this process."""
    granted_replicas: int | None = None
    """Most replicas that the arbitration between services grants; None while it limits nothing."""
    woken_unix_s: float | None = None
    """When somebody last asked for the service while it slept at zero replicas."""
    problems: dict[str, Unusable] = field(default_factory=dict)
    """Failed conditions found while reconciling, by condition type."""
    highest_epoch_held: int = 0
    _grown: dict[str, ClassDelta] = field(default_factory=dict)
    _ready_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=READY_TIMES_KEPT))

    def usable(self) -> ServicePolicy | None:
        return self.policy if isinstance(self.policy, ServicePolicy) else None

    def see_pod(self, old: PodRecord | None, new: PodRecord | None) -> None:
        """Take over a change of a pod."""
        if new is None:
            if old is not None:
                self.pods.pop(old.uid, None)
            return
        if old is not None and old.uid != new.uid:
            self.pods.pop(old.uid, None)
        state = self.pods.get(new.uid)
        if state is None:
            self.pods[new.uid] = PodState(new)
            return
        if new.ready_unix_s is not None and state.record.ready_unix_s is None:
            self._ready_times_s.append(max(0.0, new.ready_unix_s - new.created_unix_s))
        state.record = new

    def see_deployment(self, record: DeploymentRecord | None) -> None:
        self.deployment = record

    def see_outcome(self, outcome: Outcome) -> None:
        """Take over what a pod answered, or that it did not."""
        pod = self.pods.get(outcome.peer.uid)
        if pod is None:
            return  # deleted meanwhile
        match outcome:
            case Answer():
                self._see_answer(pod, outcome)
            case Refused():
                self._see_refusal(pod, outcome)
            case Failure():
                pod.failures += 1
                pod.problem = f"{outcome.reason}: {outcome.message}"

    def peers(self) -> list[Peer]:
        """Pods that can be called: they have an address and have not ended."""
        namespace, service = self.key
        return [
            Peer(namespace, service, pod.record.name, uid, pod.record.ip)
            for uid, pod in self.pods.items()
            if pod.record.ip and pod.record.phase == "Running"
        ]

    def is_stale(self, pod: PodState, now_s: float) -> bool:
        """No good report within the polls that may be missed, or one of an artifact that is not this model's."""
        policy = self.usable()
        if policy is None or pod.reported_s is None or not self.runs_this_model(pod):
            return True
        return now_s - pod.reported_s > (policy.loop.missed_polls + 0.5) * policy.loop.fast_period_s

    def runs_this_model(self, pod: PodState) -> bool:
        policy = self.usable()
        return policy is None or pod.report is None or pod.report.model.digest == policy.model_digest

    def refusing_pods(self) -> int:
        """Pods whose last word on the directive in force was no."""
        if self.directive is None:
            return 0
        refusals = [pod.refusal for pod in self.pods.values() if pod.refusal is not None]
        return sum(refusal.directive.fence == self.directive.fence for refusal in refusals)

    def has_looked(self) -> bool:
        """Every pod that can be called has answered or missed its chances: before that a plan would be a guess."""
        policy = self.usable()
        patience = policy.loop.missed_polls if policy else 3
        return all(
            pod.report is not None or pod.failures >= patience
            for pod in self.pods.values()
            if pod.record.ready and not pod.record.deleting
        )

    def observe(self, now_s: float) -> Observation:
        """The planner's view; counters' growth is handed over once."""
        grown, self._grown = self._grown, {}
        unix_s = self.unix_clock()
        offset_s = now_s - unix_s
        record = self.deployment
        return Observation(
            now_s=now_s,
            pods=tuple(self._view(pod, now_s, offset_s) for _, pod in sorted(self.pods.items())),
            classes=grown,
            ordered_replicas=self._ordered(),
            rollout=record.rolling_out if record else False,
            pod_ready_times_s=tuple(self._ready_times_s),
            unix_s=unix_s,
            woken_s=None if self.woken_unix_s is None else self.woken_unix_s + offset_s,
            degraded_left_s={
                str(one["name"]): float(one["degradedSecondsLeft"])
                for one in self.status.get("classes") or []
                if "degradedSecondsLeft" in one
            },
        )

    def _ordered(self) -> int | None:
        """None while there is no Deployment; what it is about to be told counts before what it was told."""
        if self.deployment is None:
            return None
        return self.deployment.replicas if self.desired_replicas is None else self.desired_replicas

    def _see_answer(self, pod: PodState, answer: Answer) -> None:
        report = answer.report
        try:
            self._count(pod, report)
            self._note_epoch(report.held.epoch)
        except (CountersWentBack, EpochLeap) as lie:
            pod.failures += 1
            pod.problem = f"Malformed: {lie}"
            pod.baseline = baseline_of(report)
            return
        pod.report, pod.reported_s = report, answer.received_s
        pod.problem, pod.failures = None, 0
        if answer.acknowledges is not None:
            pod.acknowledged_s, pod.refusal = answer.received_s, None

    def _see_refusal(self, pod: PodState, refused: Refused) -> None:
        pod.refusal = refused
        try:
            self._note_epoch(refused.refusal.held.epoch)
        except EpochLeap as lie:
            pod.failures += 1
            pod.problem = f"Malformed: {lie}"

    def _count(self, pod: PodState, report: Report) -> None:
        if pod.baseline is not None:
            for name, delta in differences(pod.baseline, report).items():
                before = self._grown.get(name)
                self._grown[name] = delta if before is None else demand.add(before, delta)
        pod.baseline = baseline_of(report)

    def _note_epoch(self, epoch: int) -> None:
        if epoch > self.highest_epoch_held + LARGEST_EPOCH_LEAP:
            raise EpochLeap(f"holds epoch {epoch}, more than {LARGEST_EPOCH_LEAP} above any other seen")
        self.highest_epoch_held = max(self.highest_epoch_held, epoch)

    def _view(self, pod: PodState, now_s: float, offset_s: float) -> PodView:
        record, report = pod.record, pod.report
        draining = report is not None and report.draining
        deleting = record.deleting or draining
        held = report.held.fence if report is not None and report.held.epoch else None
        return PodView(
            name=record.name,
            uid=record.uid,
            created_s=record.created_unix_s + offset_s,
            ip=record.ip,
            node=record.node,
            ready=record.ready and not deleting,
            deleting=deleting,
            serving=record.serving,
            ready_s=None if record.ready_unix_s is None else record.ready_unix_s + offset_s,
            unschedulable=record.unschedulable,
            stale=self.is_stale(pod, now_s),
            start_id=report.start_id if report else None,
            held=held,
            points={effective.class_name: effective.point for effective in report.effective} if report else {},
            load=report.load if report else None,
            profile=report.profile if report else None,
        )


class EpochLeap(Exception):
    """A pod claims an epoch that nobody can have given it."""


class World:
    """All services, and the way from a pod or an outcome to its service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.services: dict[ServiceKey, ServiceWorld] = {}
        self._pods: dict[ServiceKey, dict[str, PodRecord]] = {}
        self._deployments: dict[ServiceKey, DeploymentRecord] = {}

    def service(self, key: ServiceKey, uid: str) -> ServiceWorld:
        """The service's world; a new uid under an old name is a new service."""
        known = self.services.get(key)
        if known is None or known.uid != uid:
            known = self.services[key] = ServiceWorld(key, uid, self._clock)
            for record in self._pods.get(key, {}).values():
                known.see_pod(None, record)
            known.see_deployment(self._deployments.get(key))
        return known

    def forget(self, key: ServiceKey) -> None:
        self.services.pop(key, None)

    def see_pod(self, old: PodRecord | None, new: PodRecord | None) -> ServiceKey | None:
        record = new or old
        if record is None:
            return None
        key = (record.namespace, record.service)
        pods = self._pods.setdefault(key, {})
        if old is not None:
            pods.pop(old.uid, None)
        if new is not None:
            pods[new.uid] = new
        if not pods:
            del self._pods[key]
        if service := self.services.get(key):
            service.see_pod(old, new)
        return key

    def see_deployment(self, old: DeploymentRecord | None, new: DeploymentRecord | None) -> ServiceKey | None:
        record = new or old
        if record is None:
            return None
        key = (record.namespace, record.service)
        if new is None:
            self._deployments.pop(key, None)
        else:
            self._deployments[key] = new
        if service := self.services.get(key):
            service.see_deployment(new)
        return key

    def see_outcome(self, outcome: Outcome) -> None:
        if service := self.services.get((outcome.peer.namespace, outcome.peer.service)):
            service.see_outcome(outcome)
