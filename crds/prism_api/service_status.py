"""What the operator reports of a PrismService: the status of its CRD. The spec stands in `prism_api.service`."""

from typing import Annotated, Literal

from pydantic import Field

from prism_api.base import Document, Generation, Money, Name, Ratio, ReplicaCount, Timestamp, named_list
from prism_api.conditions import Condition


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
