"""PrismService: objectives, quality floor, cost cap and bounds of one elastic service. Source of its CRD."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from prism_api.base import (
    IMMUTABLE,
    AttainmentTarget,
    Document,
    Generation,
    Headroom,
    Money,
    Name,
    Ratio,
    ReplicaCount,
    Timestamp,
    block,
    named_list,
    rules,
)
from prism_api.conditions import Condition
from prism_api.pool import Pool

PointName = Name


class ModelReference(Document):
    """A PrismModel of the same namespace."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (IMMUTABLE, "modelRef is immutable; create a new PrismService for a new model revision")
        )
    )
    name: Annotated[str, Field(min_length=1, max_length=40)] = Field(
        description="Name of a PrismModel of this namespace."
    )


class Objectives(Document):
    """Latency objectives of a class; a request that keeps both is met."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.ttftMilliseconds) || has(self.tpotMilliseconds)",
                "objectives must set `ttftMilliseconds`, `tpotMilliseconds`, or both",
            )
        )
    )
    ttft_milliseconds: Annotated[int, Field(ge=1, le=600_000)] | None = Field(
        None, description="Time to first token that a request of this class must not exceed."
    )
    tpot_milliseconds: Annotated[int, Field(ge=1, le=60_000)] | None = Field(
        None, description="Mean time per output token after the first that a request must not exceed."
    )


class Quality(Document):
    min_relative_quality: Ratio = Field(
        "1",
        validate_default=True,
        description="Floor of the class's relative quality (lower 95 % bound); `1` never gives up any silently.",
    )
    max_degraded_seconds_per_day: Annotated[int, Field(ge=0, le=86_400)] = Field(
        86_400,
        description="Error budget of quality: seconds a day that the class may run below `budget.max`. Once spent, it "
        "stays there until a twentieth is back; 86400 is no limit.",
    )


class Overload(StrEnum):
    QUEUE = "Queue"
    SHED = "Shed"


class ServiceClass(Document):
    """A named group of requests with its own objectives, priority and quality floor."""

    name: Name = Field(description="Name of the class, the value of the class header.")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(
        0, description="Higher is served first; the lowest is degraded and shed first."
    )
    objectives: Objectives = Field(description="Latency objectives; at least one.")
    attainment_target: AttainmentTarget = Field(
        "0.95", validate_default=True, description="Share of requests that must meet every objective."
    )
    window_seconds: Annotated[int, Field(ge=60, le=3600)] = Field(300, description="Window of attainment in seconds.")
    overload: Overload = Field(
        Overload.QUEUE,
        validate_default=True,
        description="Above capacity at the floor: `Queue`, or `Shed` with 429 and Retry-After.",
    )
    quality: Quality = block(Quality, "How far quality may fall for this class.")


class BudgetControl(StrEnum):
    AUTO = "Auto"
    FIXED = "Fixed"
    OFF = "Off"


class Switch(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class Brownout(StrEnum):
    LOWEST_PRIORITY_FIRST = "LowestPriorityFirst"
    MARGINAL_QUALITY = "MarginalQuality"


class Dwell(Document):
    down_milliseconds: Annotated[int, Field(ge=0, le=60_000)] | None = Field(
        None, description="Shortest time between two steps down of the budget; 200 if not set."
    )
    up_milliseconds: Annotated[int, Field(ge=0, le=600_000)] | None = Field(
        None, description="How long saturation must stay low before one step up; 10000 if not set."
    )


class Budget(Document):
    """The fast knob: which operating points may run."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "(self.control == 'Fixed') == has(self.operatingPoint)",
                "operatingPoint must be set when budget.control is 'Fixed', and must not be set otherwise "
                "(budget.min and budget.max bound the points there)",
                ".operatingPoint",
            )
        )
    )
    control: BudgetControl = Field(
        BudgetControl.AUTO,
        validate_default=True,
        description="`Auto` moves the budget, `Fixed` holds `operatingPoint`, `Off` holds `full`.",
    )
    operating_point: PointName | None = Field(None, description="The point to hold; only with control `Fixed`.")
    min: PointName | None = Field(
        None, description="Lowest point for every class; a class's quality floor may be higher."
    )
    max: PointName = Field("full", description="Highest point for every class.")
    safe_point: PointName = Field("full", description="Where a pod goes when its envelope expires.")
    envelope_ttl_seconds: Annotated[int, Field(ge=5, le=600)] | None = Field(
        None,
        alias="envelopeTTLSeconds",
        description="How long a pod obeys its last directive without renewal; 30 if not set.",
    )
    dwell: Dwell = block(Dwell, "Least times between moves: fast down, slow up.")
    bridge_scale_up: Switch | None = Field(
        None, description="Lower the budget while ordered replicas start; `Enabled` if not set."
    )
    brownout: Brownout = Field(
        Brownout.LOWEST_PRIORITY_FIRST,
        validate_default=True,
        description="Which class sinks first: `LowestPriorityFirst`, each to its floor before the next moves, or "
        "`MarginalQuality`, the step that gives up the least quality for the capacity it gains.",
    )


class ScalingControl(StrEnum):
    MANAGED = "Managed"
    EXTERNAL = "External"
    FIXED = "Fixed"


class Stabilization(Document):
    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = Field(
        None, description="Recommendations of this window are combined; 30 up and 300 down if not set."
    )


class Behavior(Document):
    """The shape of autoscaling/v2 behavior."""

    scale_up: Stabilization = block(Stabilization, "Scaling up.")
    scale_down: Stabilization = block(Stabilization, "Scaling down.")


class Reserve(StrEnum):
    MIXED = "Mixed"
    QUALITY = "Quality"
    REPLICAS = "Replicas"


class ForecastMethod(StrEnum):
    AUTO = "Auto"
    OFF = "Off"
    HOLT = "Holt"
    HOLT_WINTERS = "HoltWinters"


class Forecast(Document):
    method: ForecastMethod = Field(
        ForecastMethod.AUTO,
        validate_default=True,
        description="`Auto` takes what erred least of late: the rate now, a trend (`Holt`) or the hour of the day "
        "(`HoltWinters`). `Off` plans for the rate now.",
    )
    horizon_seconds: Annotated[int, Field(ge=0, le=3600)] = Field(
        0, description="How far ahead; 0 is the measured time until a new pod is ready."
    )


class Idle(Document):
    scale_to_zero: Switch = Field(
        Switch.DISABLED,
        validate_default=True,
        description="Remove the last replica of an idle service; needs minReplicas 0. The annotation "
        "`moeprism.io/wake` (a new RFC 3339 time) or a schedule brings it back; requests do not.",
    )
    after_seconds: Annotated[int, Field(ge=60, le=86_400)] = Field(
        900, description="How long without a request before a service is idle."
    )


ClockTime = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", max_length=5)]
Day = Annotated[Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], Field(description="A day of the week.")]


class Schedule(Document):
    """Bounds of the replica count by time of day."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.start < self.end",
                "start must be before end; write a span over midnight as two schedules",
                ".start",
            ),
            (
                "!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
                "minReplicas must be less than or equal to maxReplicas; raise maxReplicas or lower minReplicas",
                ".minReplicas",
            ),
        )
    )
    name: Name = Field(description="Name of the schedule.")
    time_zone: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        "UTC", description="Time zone of `start` and `end`, as in the IANA database: `Europe/Berlin`."
    )
    days: Annotated[list[Day], Field(max_length=7)] = Field(
        default_factory=list, description="Days on which it applies; every day if empty."
    )
    start: ClockTime = Field(description="First minute, HH:MM. Replicas are ordered so early that they are ready.")
    end: ClockTime = Field(description="First minute after it, HH:MM; at most `23:59`.")
    min_replicas: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="Takes the place of scaling.minReplicas."
    )
    max_replicas: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Takes the place of scaling.maxReplicas."
    )


class Scaling(Document):
    """The slow knob: who owns the replica count, and its bounds."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
                "minReplicas must be less than or equal to maxReplicas; raise maxReplicas or lower minReplicas",
                ".minReplicas",
            ),
            (
                "self.idle.scaleToZero == 'Enabled' || self.minReplicas > 0",
                "minReplicas must be greater than 0 unless idle.scaleToZero is 'Enabled'",
                ".minReplicas",
            ),
        )
    )
    control: ScalingControl = Field(
        ScalingControl.MANAGED,
        validate_default=True,
        description="`Managed`: the operator decides. `External`: HPA, KEDA or a user through /scale. "
        "`Fixed`: as written.",
    )
    min_replicas: Annotated[int, Field(ge=0, le=1000)] = Field(
        1, description="Lower bound of replicas; 0 needs idle.scaleToZero, and even then a busy service keeps one."
    )
    max_replicas: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Upper bound of replicas; required when Managed."
    )
    max_step: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="Most replicas that one decision adds or removes; 4 if not set."
    )
    headroom: Headroom | None = Field(
        None,
        description="Share of capacity kept above the planned demand, a decimal up to 2. If not set, it is learned: "
        "`0.10`, or as much as the load lately exceeded what was expected of it before new replicas could be ready.",
    )
    reserve: Reserve = Field(
        Reserve.MIXED,
        validate_default=True,
        description="In what coin `headroom` is held: `Replicas` as idle pods, `Quality` as room that the budget can "
        "make, `Mixed` half and half.",
    )
    forecast: Forecast = block(Forecast, "Planning for the load at the time when new replicas are ready.")
    behavior: Behavior = block(Behavior, "Stabilization windows.")
    idle: Idle = block(Idle, "Scale to zero.")
    schedules: list[Schedule] = named_list(
        "Bounds by time of day; of several that apply the first one counts.", default_factory=list, max_length=16
    )


class OnCap(StrEnum):
    DEGRADE_THEN_SHED = "DegradeThenShed"
    SHED = "Shed"
    ALERT = "Alert"


class Cost(Document):
    """What the replicas may cost."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.targetPerHour) || !has(self.maxPerHour) || "
                "quantity(self.targetPerHour).compareTo(quantity(self.maxPerHour)) <= 0",
                "targetPerHour must be less than or equal to maxPerHour",
                ".targetPerHour",
            )
        )
    )
    max_per_hour: Money | None = Field(
        None, description="Cap on replicas x pricePerHour, in the fleet's currency; hard unless onCap is `Alert`."
    )
    target_per_hour: Money | None = Field(
        None, description="Above this cost a lower budget is preferred to more replicas, as far as the floors allow."
    )
    on_cap: OnCap = Field(
        OnCap.DEGRADE_THEN_SHED,
        validate_default=True,
        description="When the cap keeps replicas from being added: `DegradeThenShed` lowers the budget first, `Shed` "
        "keeps quality and turns requests away (classes with overload `Shed`), `Alert` exceeds the cap and says so.",
    )


class Engine(Document):
    max_sequences: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Most sequences that decode at once; the runtime's default if not set."
    )
    max_context_tokens: Annotated[int, Field(ge=64, le=1_048_576)] | None = Field(
        None, description="Longest prompt plus answer; the model's limit if not set."
    )


class Runtime(Document):
    image: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="Runtime image; pin it by digest in production."
    )
    service_port: Annotated[int, Field(ge=1, le=65535)] = Field(
        8000, description="Port of the OpenAI API; control (8081) and metrics (8082) are fixed."
    )
    engine: Engine = block(Engine, "Limits of the engine.")


class Rollout(Document):
    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.maxSurge + self.maxUnavailable > 0",
                "rollout.maxSurge and rollout.maxUnavailable must not both be 0; set maxUnavailable to 1",
                ".maxUnavailable",
            ),
            (
                "self.terminationGracePeriodSeconds >= self.drainSeconds + 15",
                "rollout.terminationGracePeriodSeconds must be at least drainSeconds + 15",
                ".terminationGracePeriodSeconds",
            ),
        )
    )
    max_surge: Annotated[int, Field(ge=0, le=100)] = Field(0, description="Extra pods during a rollout.")
    max_unavailable: Annotated[int, Field(ge=0, le=100)] = Field(1, description="Missing pods during a rollout.")
    drain_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        45, description="How long accepted requests may finish after a pod is told to stop."
    )
    termination_grace_period_seconds: Annotated[int, Field(ge=16, le=3700)] = Field(
        60, description="When a stopping pod is killed; at least drainSeconds + 15."
    )


class Disruption(Document):
    max_unavailable: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="maxUnavailable of the PodDisruptionBudget; never 0, so it cannot block a drain for ever."
    )


class Networking(Document):
    class_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$", min_length=1, max_length=64)] = Field(
        "x-prism-class", description="Header that names the service class; let only a trusted gateway set it."
    )
    network_policy: Switch = Field(
        Switch.ENABLED, validate_default=True, description="Create a NetworkPolicy for the pods."
    )


class Mode(StrEnum):
    ACTIVE = "Active"
    ADVISORY = "Advisory"
    PAUSED = "Paused"


class PrismServiceSpec(Document):
    """What a service promises, how far its quality may fall, and what it may cost."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.scaling.control != 'Managed' || has(self.scaling.maxReplicas)",
                "scaling.maxReplicas must be set when scaling.control is 'Managed'",
                ".scaling.maxReplicas",
            ),
            (
                "(self.scaling.control == 'Managed') != has(self.replicas)",
                "replicas must be set when scaling.control is 'External' or 'Fixed', and must not be set when it is "
                "'Managed' (set scaling.minReplicas and scaling.maxReplicas there)",
                ".replicas",
            ),
            (
                "has(self.defaultClass) ? self.classes.exists(c, c.name == self.defaultClass) "
                ": size(self.classes) == 1",
                "defaultClass must name one of `classes`, and is required with two or more classes",
                ".defaultClass",
            ),
        )
    )
    model_ref: ModelReference = Field(description="The PrismModel to serve; immutable.")
    mode: Mode = Field(
        Mode.ACTIVE,
        validate_default=True,
        description="`Active` decides and acts. `Advisory` runs every class at `full`, leaves the replicas as they "
        "are, and publishes what it would do in status.recommendation. `Paused` holds points and replicas. All of them "
        "repair what the operator owns.",
    )
    replicas: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Replica count of the /scale subresource; only when scaling.control is External or Fixed."
    )
    default_class: Name | None = Field(None, description="Class of a request without class header.")
    classes: list[ServiceClass] = named_list("Service classes.", min_length=1, max_length=8)
    budget: Budget = block(Budget, "The fast knob: which operating points may run.")
    scaling: Scaling = block(Scaling, "The slow knob: who owns the replica count, and its bounds.")
    cost: Cost = block(Cost, "Cost cap.")
    pools: list[Pool] = named_list("Pools of pods; exactly one in v1alpha1.", min_length=1, max_length=1)
    runtime: Runtime = Field(description="Image and limits of the runtime.")
    rollout: Rollout = block(Rollout, "How pods are replaced and drained.")
    disruption: Disruption = block(Disruption, "PodDisruptionBudget.")
    networking: Networking = block(Networking, "Headers and network policy.")

    @property
    def default_class_name(self) -> str:
        return self.default_class or self.classes[0].name

    @property
    def pool(self) -> Pool:
        return self.pools[0]


class BudgetStatus(Document):
    epoch: Generation = Field(description="Epoch of the last directive.")
    sequence: Generation = Field(description="Sequence of the last directive.")
    acked_replicas: ReplicaCount = Field(description="Ready pods that acknowledged the last directive.")
    stale_replicas: ReplicaCount = Field(description="Ready pods without a fresh report.")
    mean_budget_permille: Annotated[int, Field(ge=0, le=1000)] = Field(
        description="Mean activation budget over ready pods and classes."
    )
    last_switch_time: Timestamp | None = Field(None, description="When an operating point last changed, RFC 3339.")


class ClassStatus(Document):
    """What one service class gets now."""

    name: Name = Field(description="Name of the class.")
    point: Name = Field(description="Operating point last sent.")
    effective_pods: ReplicaCount = Field(description="Pods that run this class at `point`.")
    attainment: Ratio | None = Field(None, description="Share of requests met in the window; absent without traffic.")
    ttft_milliseconds: Annotated[int, Field(ge=0, le=86_400_000)] | None = Field(
        None, description="Time to first token at the attainment target's quantile."
    )
    tpot_milliseconds: Annotated[int, Field(ge=0, le=86_400_000)] | None = Field(
        None, description="Time per output token at the attainment target's quantile."
    )
    relative_quality: Ratio | None = Field(None, description="Token-weighted relative quality in the window.")
    degraded_seconds_left: Annotated[int, Field(ge=0, le=86_400)] | None = Field(
        None, description="What is left of quality.maxDegradedSecondsPerDay; absent without such a limit."
    )


class CostStatus(Document):
    per_hour: Money = Field(description="Current price of all replicas an hour.")
    cap_utilization: Money | None = Field(None, description="perHour divided by cost.maxPerHour.")


class RecommendedPoint(Document):
    """The planned operating point of one class."""

    class_name: Name = Field(alias="class", description="Name of the class.")
    point: Name = Field(description="Operating point that the plan wants.")


class Recommendation(Document):
    replicas: ReplicaCount = Field(description="Replicas that the plan wants.")
    points: list[RecommendedPoint] = Field(max_length=8, description="Operating point per class.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="Why; one of the documented reasons.")


class Decision(Document):
    """One move of a knob. Newest first in status, at most five."""

    time: Timestamp = Field(description="When, RFC 3339.")
    kind: Literal["Budget", "Replicas"] = Field(description="Which knob.")
    class_name: Name | None = Field(None, alias="class", description="Class, for a Budget decision.")
    from_: Annotated[str, Field(max_length=32)] = Field(alias="from", description="Value before.")
    to: Annotated[str, Field(max_length=32)] = Field(description="Value after.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="Why; one of the documented reasons.")
    message: Annotated[str, Field(max_length=512)] = Field(description="Inputs and the rejected alternative.")


class PrismServiceStatus(Document):
    """What the operator saw and did. Small and slow: written on change, at most once every five seconds."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that this status describes."
    )
    replicas: ReplicaCount | None = Field(None, description="Pods of the Deployment; the /scale subresource reads it.")
    ready_replicas: ReplicaCount | None = Field(None, description="Pods that are Ready.")
    starting_replicas: ReplicaCount | None = Field(None, description="Pods that are ordered and not yet Ready.")
    desired_replicas: ReplicaCount | None = Field(None, description="Pods that the operator wants.")
    selector: Annotated[str, Field(max_length=256)] | None = Field(None, description="Label selector of the pods.")
    budget: BudgetStatus | None = Field(None, description="The last directive and who follows it.")
    classes: list[ClassStatus] | None = named_list("State by class.", default=None, max_length=8)
    cost: CostStatus | None = Field(None, description="What the service costs now.")
    recommendation: Recommendation | None = Field(None, description="What the plan wants now.")
    decisions: list[Decision] | None = Field(None, max_length=5, description="The last five decisions, newest first.")
    conditions: list[Condition] | None = named_list("Conditions.", key="type", default=None, max_length=16)
