"""What the engines of a pool's pods cost and promise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_api.profile import Profile
from prism_operator.simulate.order import Promise


@dataclass(frozen=True, slots=True)
class PointCost:
    """One operating point in seconds, and its relative quality."""

    name: str
    base_s: float
    sequence_s: float
    token_s: float
    """Per token of context."""
    prefill_s: float
    prefill_token_s: float
    quality: float


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What all pods of a pool share.

    promises  by class: waiting requests start as the runtime's default policy has it (`Slack` of
              prism_runtime.engine.batching). None: in order of arrival, as vLLM's default has it.
    """

    classes: tuple[str, ...]
    points: Mapping[str, PointCost]
    max_sequences: int
    kv_tokens: int
    chunk: int
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's duration."""
    promises: Mapping[str, Promise] | None = None

    @classmethod
    def of(
        cls,
        profile: Profile,
        classes: Sequence[str],
        quality: Mapping[str, float],
        noise: float = 0.0,
        promises: Mapping[str, Promise] | None = None,
    ) -> "EngineModel":
        """From a profile and the relative quality of each of its points."""
        points = {
            name: PointCost(
                name=name,
                base_s=point.step_base_nanoseconds * 1e-9,
                sequence_s=point.step_per_sequence_nanoseconds * 1e-9,
                token_s=point.step_per_kilotoken_nanoseconds * 1e-12,
                prefill_s=point.prefill_base_nanoseconds * 1e-9,
                prefill_token_s=point.prefill_per_token_nanoseconds * 1e-9,
                quality=quality[name],
            )
            for name, point in profile.points.items()
            if name in quality
        }
        return cls(
            tuple(classes),
            points,
            profile.max_sequences,
            profile.kv_tokens,
            profile.prefill_tokens_per_step,
            noise,
            promises,
        )
