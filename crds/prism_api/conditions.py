"""Conditions: the standard Kubernetes schema."""

from typing import Annotated, Literal

from pydantic import Field

from prism_api.base import Document, Generation, Timestamp


class Condition(Document):
    """One aspect of an object's state, as `kubectl wait --for=condition=...` reads it."""

    type: Annotated[str, Field(max_length=64)] = Field(description="Name of the condition, CamelCase.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="Machine-readable reason, CamelCase.")
    message: Annotated[str, Field(max_length=1024)] = Field(description="What was seen, and what would help.")
    last_transition_time: Timestamp = Field(description="When `status` last changed, RFC 3339.")
    observed_generation: Generation | None = Field(None, description="Generation that the condition describes.")
