"""Pods of a PrismService: what a replica runs on, what it costs, and the closed list of what users may change."""

from typing import Annotated, Literal

from pydantic import Field

from prism_api.base import Document, Money, Name, block, named_list


class AcceleratorResource(Document):
    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="Extended resource, for example nvidia.com/gpu."
    )
    count: Annotated[int, Field(ge=1, le=64)] = Field(1, description="How many of it one replica takes.")


class Accelerator(Document):
    name: Name = Field(description="Key of profiles and prices, for example h100; `cpu` without a resource.")
    resource: AcceleratorResource | None = Field(None, description="Extended resource that a replica requests.")


class Toleration(Document):
    """A taint that the pods tolerate; the fields of core/v1."""

    key: Annotated[str, Field(max_length=316)] | None = Field(None, description="Taint key; empty matches all keys.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="`Exists` or `Equal`.")
    value: Annotated[str, Field(max_length=63)] | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Taint effect.")


class EnvironmentVariable(Document):
    """An environment variable of the runtime container."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = Field(
        description="Name of the variable."
    )
    value: Annotated[str, Field(max_length=1024)] = Field(description="Its value; references are not supported.")


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=16)]


class PodResources(Document):
    cpu: Quantity = Field("1", description="CPU request.")
    memory: Quantity = Field("2Gi", description="Memory request and limit.")


LabelValue = Annotated[str, Field(max_length=63, description="Value of the label.")]


class PodOptions(Document):
    """The closed list of what a user may change in the pods."""

    node_selector: dict[str, LabelValue] = Field(
        default_factory=dict, max_length=16, description="Labels of the nodes that may run the pods."
    )
    tolerations: list[Toleration] = Field(default_factory=list, max_length=16, description="Tolerated taints.")
    priority_class_name: Annotated[str, Field(max_length=253)] | None = Field(None, description="PriorityClass.")
    resources: PodResources = block(PodResources, "CPU and memory of one replica.")
    env: list[EnvironmentVariable] = named_list(
        "Environment variables, by value only.", default_factory=list, max_length=32
    )


class Pool(Document):
    """Pods of one kind."""

    name: Name = Field(description="Name of the pool.")
    accelerator: Accelerator = Field(description="What a replica runs on.")
    price_per_hour: Money | None = Field(None, description="Price of one replica an hour; a cost cap needs it.")
    pod: PodOptions = block(PodOptions, "What may be changed in the pods.")
