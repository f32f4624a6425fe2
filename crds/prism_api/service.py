"""PrismService: objectives, quality floor, cost cap and bounds of one elastic service. Source of its CRD's spec."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from prism_api.base import (
    IMMUTABLE,
    AttainmentTarget,
    Document,
    Money,
    Name,
    Ratio,
    block,
    named_list,
    rules,
)
from prism_api.pool import Pool
from prism_api.scaling import Scaling, Switch

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


class Brownout(StrEnum):
    LOWEST_PRIORITY_FIRST = "LowestPriorityFirst"
    MARGINAL_QUALITY = "MarginalQuality"


class BudgetOnSignalLoss(StrEnum):
    HOLD = "Hold"
    HOLD_THEN_SAFE_POINT = "HoldThenSafePoint"
    SAFE_POINT = "SafePoint"


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
    on_signal_loss: BudgetOnSignalLoss = Field(
        BudgetOnSignalLoss.HOLD,
        validate_default=True,
        description="While fewer than half of the ready pods report, those that do `Hold` their points, go to "
        "`safePoint` (`SafePoint`), or do so once an envelope would have expired, as it does in pods that cannot be "
        "reached (`HoldThenSafePoint`).",
    )
    brownout: Brownout = Field(
        Brownout.LOWEST_PRIORITY_FIRST,
        validate_default=True,
        description="Which class sinks first: `LowestPriorityFirst`, each to its floor before the next moves, or "
        "`MarginalQuality`, the step that gives up the least quality for the capacity it gains.",
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
