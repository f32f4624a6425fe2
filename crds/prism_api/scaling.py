"""Block `scaling` of a PrismService: who owns the replica count, its bounds, and how a count is chosen inside them."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from prism_api.base import Document, Headroom, Name, block, named_list, rules


class Switch(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class ScalingControl(StrEnum):
    MANAGED = "Managed"
    EXTERNAL = "External"
    FIXED = "Fixed"


class PolicyType(StrEnum):
    PODS = "Pods"
    PERCENT = "Percent"


class SelectPolicy(StrEnum):
    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


class ScalingPolicy(Document):
    """A limit on how much the count changes within a period."""

    type: PolicyType = Field(description="`Pods`: a number of replicas. `Percent`: of those at the period's beginning.")
    value: Annotated[int, Field(ge=1, le=1000)] = Field(description="Most that may be added or removed in a period.")
    period_seconds: Annotated[int, Field(ge=1, le=1800)] = Field(description="The period, looking back from now.")


class Direction(Document):
    """How the count moves one way."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = Field(
        None, description="Recommendations of this window are combined; 30 up and 300 down if not set."
    )
    select_policy: SelectPolicy | None = Field(
        None,
        description="Of several policies, the one that allows the largest change (`Max`, if not set) or the smallest "
        "(`Min`); `Disabled` never moves this way, other than into new bounds.",
    )
    policies: Annotated[list[ScalingPolicy], Field(max_length=4)] = Field(
        default_factory=list,
        description="Limits on the pace. If empty, nothing but `maxStep` limits the way up, and one replica goes in "
        "120 seconds on the way down. A decision removes one replica at most, whatever they allow.",
    )


class Behavior(Document):
    """The shape of autoscaling/v2 behavior."""

    scale_up: Direction = block(Direction, "Scaling up.")
    scale_down: Direction = block(Direction, "Scaling down.")


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


class OnSignalLoss(StrEnum):
    CURRENT = "Current"
    STATIC = "Static"
    CURRENT_IF_HIGHER = "CurrentIfHigher"
    CURRENT_IF_LOWER = "CurrentIfLower"


class SignalLoss(Document):
    """The replica count while fewer than half of the ready pods report."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "(self.behavior == 'Current') != has(self.replicas)",
                "replicas must be set when onSignalLoss.behavior is not 'Current', and must not be set otherwise",
                ".replicas",
            )
        )
    )
    behavior: OnSignalLoss = Field(
        OnSignalLoss.CURRENT,
        validate_default=True,
        description="`Current` keeps what is ordered, `Static` orders `replicas`, `CurrentIfHigher` and "
        "`CurrentIfLower` the higher or the lower of both.",
    )
    replicas: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="A count that is known to be enough; bounds and caps still hold."
    )
    after_seconds: Annotated[int, Field(ge=10, le=3600)] = Field(
        60, description="How long reports must be missing before the count changes; until then it is kept."
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
    behavior: Behavior = block(Behavior, "Stabilization windows, and limits on the pace.")
    idle: Idle = block(Idle, "Scale to zero.")
    on_signal_loss: SignalLoss = block(SignalLoss, "The count while fewer than half of the ready pods report.")
    schedules: list[Schedule] = named_list(
        "Bounds by time of day; of several that apply the first one counts.", default_factory=list, max_length=16
    )
