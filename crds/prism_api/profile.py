"""Profile: measured cost of each operating point on one accelerator.

One engine step with B decoding sequences that hold K context tokens in all, and n prompt tokens of prefill, takes

    step_s = step_base + step_per_sequence * B + step_per_kilotoken * K / 1000
             + (prefill_base if n else 0) + prefill_per_token * n

All integers are nanoseconds. A runtime measures it (or is paced by it) and publishes it in its report.
"""

from typing import Annotated

from pydantic import Field

from prism_api.base import Document, Name

Nanoseconds = Annotated[int, Field(ge=0, le=10**12)]


class PointProfile(Document):
    """Cost of one operating point. See the module's formula."""

    step_base_nanoseconds: Nanoseconds
    step_per_sequence_nanoseconds: Nanoseconds
    step_per_kilotoken_nanoseconds: Nanoseconds
    prefill_base_nanoseconds: Nanoseconds
    prefill_per_token_nanoseconds: Nanoseconds
    fit_error_permille: Annotated[int, Field(ge=0, le=10_000)] = 0

    def step_seconds(self, sequences: int, context_tokens: int, prefill_tokens: int) -> float:
        """Duration of one step in seconds."""
        nanoseconds = (
            self.step_base_nanoseconds
            + self.step_per_sequence_nanoseconds * sequences
            + self.step_per_kilotoken_nanoseconds * context_tokens / 1000
            + (self.prefill_base_nanoseconds if prefill_tokens else 0)
            + self.prefill_per_token_nanoseconds * prefill_tokens
        )
        return nanoseconds * 1e-9


class Profile(Document):
    """Cost model of one model on one accelerator: limits of the engine, and one entry per operating point."""

    accelerator: Name
    provenance: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="Where the figures come from: measured (how, on what) or estimated (from what)."
    )
    max_sequences: Annotated[int, Field(ge=1, le=4096)]
    kv_tokens: Annotated[int, Field(ge=1)]
    prefill_tokens_per_step: Annotated[int, Field(ge=1)]
    points: dict[str, PointProfile] = Field(min_length=1, max_length=32)
