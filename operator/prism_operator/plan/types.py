"""What the planner sees, remembers and answers: frozen data, no behaviour beyond printing.

Time is `now_s`: seconds of one monotonic clock, an argument everywhere. Units stand in the names. `None` means unknown
and is never read as zero. States hold plain values only, so that `dataclasses.asdict` gives JSON, and are bounded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from prism_api.control import Admission, Fence, Load
from prism_api.effective import EffectiveSettings
from prism_api.points import Ladder
from prism_api.profile import Profile
from prism_api.scaling import ScalingControl, Schedule
from prism_api.service import Brownout, BudgetControl, OnCap
from prism_operator.plan.behavior import Move
from prism_operator.plan.forecast import ForecastState
from prism_operator.plan.loop_settings import LoopSettings
from prism_operator.plan.reasons import Reason, Status
from prism_operator.plan.recommendation import Recommendation
from prism_operator.plan.surprise import SurpriseState


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of the service. What comes from its report is that of the last report that was understood."""

    name: str
    uid: str
    created_s: float
    ip: str | None = None
    node: str | None = None
    ready: bool = False
    """Condition Ready of the pod, and not deleting."""
    deleting: bool = False
    """Has a deletion timestamp, or its report says draining."""
    ready_s: float | None = None
    """When it last became Ready."""
    serving: bool = True
    """In traffic: it carries the label that the Service selects. Off while a scale-down is rehearsed."""
    unschedulable: bool = False
    stale: bool = False
    """No fresh report (three polls missed, or never one)."""
    start_id: str | None = None
    held: Fence | None = None
    """None: never managed, or no report yet."""
    points: Mapping[str, str] = field(default_factory=dict)
    """Class -> effective operating point; empty while unknown."""
    load: Load | None = None
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class ClassDelta:
    """What one class's counters grew by since the last observation, summed over the pods heard."""

    arrived: int = 0
    finished: int = 0
    met: int = 0
    missed: int = 0
    shed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: tuple[int, ...] = ()
    """48 counts with the bounds of `prism_api.control`, or empty for none."""
    tpot: tuple[int, ...] = ()
    tokens_by_point: Mapping[str, int] = field(default_factory=dict)
    in_out: tuple[int, ...] = ()
    """Finished requests in the 4 x 4 cells of `prism_api.control.in_out_cell`, or empty for none."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One service at one tick."""

    now_s: float
    pods: tuple[PodView, ...] = ()
    classes: Mapping[str, ClassDelta] = field(default_factory=dict)
    """Only classes that a fresh report spoke of; a class that is absent is unknown, not idle."""
    ordered_replicas: int | None = None
    """`spec.replicas` of the Deployment; None while there is none."""
    rollout: bool = False
    """The Deployment replaces pods by a new template."""
    pod_ready_times_s: tuple[float, ...] = ()
    """Measured creation-to-Ready times of this pool, oldest first; the last ten matter."""
    unix_s: float | None = None
    """Wall-clock time, for schedules alone; None: unknown, and then no schedule applies."""
    woken_s: float | None = None
    """When somebody last asked for a service that sleeps at zero replicas; on the clock of `now_s`."""
    degraded_left_s: Mapping[str, float] = field(default_factory=dict)
    """Class -> what an earlier process left of its quality error budget; read after a start alone."""

    @property
    def ready(self) -> tuple[PodView, ...]:
        """Ready and in traffic."""
        return tuple(pod for pod in self.pods if pod.ready and pod.serving and not pod.deleting)

    @property
    def rehearsed(self) -> int:
        """Ready pods that are out of traffic on purpose."""
        return sum(pod.ready and not pod.serving and not pod.deleting for pod in self.pods)

    @property
    def missing(self) -> int:
        """Replicas that are ordered and not ready."""
        return max(0, (self.ordered_replicas or 0) - len(self.ready) - self.rehearsed)

    @property
    def fresh(self) -> tuple[PodView, ...]:
        return tuple(pod for pod in self.ready if not pod.stale)

    @property
    def settled_s(self) -> float:
        """How long the newest pod has been ready; infinite where that is not known of any."""
        return self.now_s - max((pod.ready_s for pod in self.ready if pod.ready_s is not None), default=-math.inf)

    @property
    def oldest_s(self) -> float:
        """How long the oldest pod has been ready; 0 where that is not known of any."""
        return self.now_s - min((pod.ready_s for pod in self.ready if pod.ready_s is not None), default=self.now_s)

    @property
    def starting(self) -> tuple[PodView, ...]:
        return tuple(pod for pod in self.pods if not pod.ready and not pod.deleting)

    @property
    def profile(self) -> Profile | None:
        """Profile of the pool's accelerator, from a pod that published one; ready pods first."""
        ordered = sorted(self.pods, key=lambda pod: (not pod.ready, pod.stale, pod.uid))
        return next((pod.profile for pod in ordered if pod.profile is not None), None)


@dataclass(frozen=True, slots=True)
class ClassPolicy:
    """One class with everything resolved; at least one objective is set."""

    name: str
    priority: int
    ttft_s: float | None
    tpot_s: float | None
    attainment_target: float
    window_s: int
    sheds: bool
    floor: str
    """Lowest operating point: the higher of `budget.min` and what keeps minRelativeQuality, at most `max_point`."""
    degraded_s_per_day: int | None = None
    """Seconds a day that the class may run below `max_point`; None for no limit."""


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """A service's spec, its model and the loops' settings, checked and resolved."""

    classes: tuple[ClassPolicy, ...]
    default_class: str
    ladder: Ladder
    model_digest: str
    budget: BudgetControl
    fixed_point: str | None
    """Only with budget control Fixed; raised to a class's floor where that is higher."""
    max_point: str
    safe_point: str
    paused: bool
    scaling: ScalingControl
    min_replicas: int
    max_replicas: int | None
    spec_replicas: int | None
    """The /scale field; set iff scaling is External or Fixed."""
    price_per_hour: Decimal | None
    max_per_hour: Decimal | None
    effective: EffectiveSettings
    loop: LoopSettings
    advisory: bool = False
    """Plan and publish, act on nothing."""
    brownout: Brownout = Brownout.LOWEST_PRIORITY_FIRST
    target_per_hour: Decimal | None = None
    on_cap: OnCap = OnCap.DEGRADE_THEN_SHED
    idle_after_s: int | None = None
    """Seconds without a request until a service with min_replicas 0 is put to zero; None: never."""
    schedules: tuple[Schedule, ...] = ()
    granted_replicas: int | None = None
    """Most replicas that the arbitration between services grants; None without one. See `plan.fleet`."""

    @property
    def cap_replicas(self) -> int | None:
        """Most replicas that the cost cap pays for; None without a cap that holds."""
        if self.max_per_hour is None or not self.price_per_hour or self.on_cap is OnCap.ALERT:
            return None
        return int(self.max_per_hour // self.price_per_hour)

    @property
    def target_replicas(self) -> int | None:
        """Replicas above which a lower budget is preferred; None without a target."""
        if self.target_per_hour is None or not self.price_per_hour:
            return None
        return int(self.target_per_hour // self.price_per_hour)

    def by_name(self, name: str) -> ClassPolicy:
        return next(policy for policy in self.classes if policy.name == name)


@dataclass(frozen=True, slots=True)
class Unusable:
    """A spec that cannot be planned: the condition that turns False, its reason, and what would help."""

    condition: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.condition}=False {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Counts of one class over (start_s, end_s]; `heard` is the share of ready pods that they cover."""

    start_s: float
    end_s: float
    heard: float
    delta: ClassDelta


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a request: means, and second moments where they are known.

    What is None is taken as exponential lengths, prompt and output independent of each other.
    """

    prompt_tokens: float
    output_tokens: float
    prompt_squared: float | None = None
    output_squared: float | None = None
    product: float | None = None
    output_inverse: float | None = None
    """Mean of 1 / output: the weight of one disturbance in a request's mean time per token."""

    @property
    def context_tokens(self) -> float:
        """Mean context of a running sequence: long outputs run for longer, so they count for more.

        (E[prompt * output] + E[output^2] / 2) / E[output]
        """
        product = self.prompt_tokens * self.output_tokens if self.product is None else self.product
        squared = 2 * self.output_tokens**2 if self.output_squared is None else self.output_squared
        return (product + squared / 2) / self.output_tokens if self.output_tokens else self.prompt_tokens

    @property
    def prompt_cv_squared(self) -> float:
        """Squared coefficient of variation of prompt lengths."""
        if self.prompt_squared is None or not self.prompt_tokens:
            return 1.0
        return max(0.0, self.prompt_squared / self.prompt_tokens**2 - 1)


@dataclass(frozen=True, slots=True)
class DemandState:
    """Samples per class, oldest first: single ticks in the long window, ten-second sums before it."""

    since_s: float | None = None
    """First observation of this process: how long the history is."""
    last_s: float | None = None
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    ready_pods: tuple[str, ...] = ()
    """Uids of the ready pods of the last observation."""
    ready_since_s: float | None = None
    """Since when exactly these are ready."""
    cost_factor: float = 1.0
    """Observed over predicted step time: what the profile's costs are multiplied by. See `plan.calibration`."""
    cost_variance: float = 0.0
    """Mean squared difference of what was observed from that factor."""
    cells: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Class -> finished requests by length cell, older ones fading. See `plan.lengths`."""


@dataclass(frozen=True, slots=True)
class ClassTarget:
    """What one class is told, and why."""

    name: str
    point: str
    floor: str
    ceiling: str
    admission: Admission
    status: Status
    reason: Reason
    message: str
    """Inputs, and the best rejected alternative."""
    saturation: float | None = None
    degraded_left_s: float | None = None
    """What is left of the error budget of quality; None without one."""
    rejected: str = ""
    """The best alternative and why it was not taken; empty where there was none."""

    def __str__(self) -> str:
        shed = " shedding" if self.admission is Admission.SHED else ""
        return f"{self.name}={self.point} [{self.floor}, {self.ceiling}]{shed} {self.status} {self.reason}"


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The fast decision. `status` and `reason` are those of the class that explains most."""

    status: Status
    reason: Reason
    message: str
    classes: tuple[ClassTarget, ...]
    """Empty before anything is known about the pods: then nothing is to be sent."""
    bridging: bool = False
    """Replicas are ordered and not ready."""
    fits: bool | None = None
    """Demand fits ready capacity at these points; None if demand or capacity is unknown."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    """The figures that were decided on."""
    advised: Mapping[str, str] = field(default_factory=dict)
    """In advisory mode: class -> the point that it would run at."""

    def by_name(self, name: str) -> ClassTarget:
        return next(target for target in self.classes if target.name == name)

    def __str__(self) -> str:
        targets = ", ".join(f"{target.name}={target.point}" for target in self.classes)
        return f"budget {self.status} {self.reason}: {targets}; {self.message}"


@dataclass(frozen=True, slots=True)
class ClassBudgetState:
    """Memory of one class between ticks."""

    point: str
    moved_s: float
    """When the point last changed, or was adopted."""
    low_since_s: float | None = None
    """Since when a step up has been justified, with a margin, without a break."""
    narrow_since_s: float | None = None
    """The same without the margin."""
    risen_s: float | None = None
    """When the class last took a step up."""
    patience: int = 1
    """Dwells that the next step up must last through; grows with steps that had to be taken back soon."""
    cause: Reason = Reason.STEADY
    """Why the class last went down."""
    shedding: bool = False
    degraded_left_s: float | None = None
    """What is left of the error budget of quality; None without one."""
    spent: bool = False
    """It ran out and not enough is back."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """Memory of the fast loop; empty after a start, then the pods' points are adopted."""

    classes: Mapping[str, ClassBudgetState] = field(default_factory=dict)
    known_pods: tuple[str, ...] = ()
    """Uids of the ready pods of the last tick."""
    lost_s: float | None = None
    """When a ready pod last vanished without being told to."""
    last_s: float | None = None
    """The last tick: how long a class has run where it did."""
    bridging_since_s: float | None = None
    """Since when replicas have been ordered and not ready, without a break."""
    blind_since_s: float | None = None
    """Since when too few pods have reported."""


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """The slow decision. `replicas` is to be ordered; `recommended` is what demand asks for, before any bound."""

    status: Status
    reason: Reason
    message: str
    replicas: int
    recommended: int
    limited_by: Reason | None = None
    """Which bound cut the recommendation; None if none did."""
    stuck_pods: tuple[str, ...] = ()
    """Pods that start for too long: they get no credit."""
    inputs: Mapping[str, float] = field(default_factory=dict)
    """The figures that were decided on."""
    rejected: str = ""
    """The best alternative and why it was not taken; empty where there was none."""
    out_of_traffic: tuple[str, ...] = ()
    """Uids of pods that are to carry no serving label: the one that is rehearsed without, then given up."""

    def __str__(self) -> str:
        return f"replicas {self.status} {self.reason}: {self.replicas} (recommended {self.recommended}); {self.message}"


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A pod out of traffic since `since_s`, when the load needed `kept` replicas; `passed` once its removal was
    ordered."""

    uid: str
    name: str
    since_s: float
    kept: int
    passed: bool = False


@dataclass(frozen=True, slots=True)
class FailedRehearsal:
    """The last one that failed: `kept` replicas turned out to be too few."""

    at_s: float
    kept: int


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Memory of the slow loop."""

    since_s: float | None = None
    """First decision of this process: no scale-down until the down window is full of its own recommendations."""
    recommendations: tuple[Recommendation, ...] = ()
    ordered_for: int | None = None
    """Recommendation that the last scale-up answered: only a higher one may add to it while pods start."""
    moves: tuple[Move, ...] = ()
    """What was ordered lately, for limits on the pace."""
    forecasts: Mapping[str, ForecastState] = field(default_factory=dict)
    """By class; empty with forecasts off."""
    surprises: Mapping[str, SurpriseState] = field(default_factory=dict)
    """By class; empty with a headroom that is set."""
    idle_since_s: float | None = None
    """Since when every pod has reported that there is nothing to do."""
    blind_since_s: float | None = None
    """Since when too few pods have reported."""
    rehearsal: Rehearsal | None = None
    rehearsal_failed: FailedRehearsal | None = None
    """The next rehearsal waits for twice the down window, or until the load needs fewer than were tried."""
