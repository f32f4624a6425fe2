"""What a step will take: a profile's formula for its shape and operating points, corrected by the steps that were run.

Sequences of different points share a step: each pays for itself and its context at its own point, all for the costliest
base. A moving factor follows the machine as it is now: load beside it, another clock, other text than the profile's.
"""

from collections.abc import Mapping

from prism_api.points import Ladder
from prism_api.profile import PointProfile, Profile

SMOOTHING = 0.1
"""Weight of the newest step in the factor: about ten steps until a change shows, one odd step moves little."""
MOST_A_STEP = 3.0
"""A step further off than this, either way, counts as this far off: it met something else on the machine."""


class StepCosts:
    """Prices steps once it has a profile of every point; without one it knows nothing."""

    def __init__(self, ladder: Ladder) -> None:
        self._names = ladder.names
        self._points: list[PointProfile] = []
        self.factor = 1.0

    @property
    def known(self) -> bool:
        return bool(self._points)

    def take(self, profile: Profile) -> None:
        """Price by `profile` from now on. Raises KeyError if it lacks a point of the ladder."""
        self._points = [profile.points[name] for name in self._names]
        self.factor = 1.0

    def seconds(self, decode: Mapping[int, int], context_tokens: int, prefill: Mapping[int, int]) -> float:
        """A step's duration. Precondition: `known`.

        decode          decoding sequences by operating point
        context_tokens  what they hold in all
        prefill         prompt tokens by operating point
        """
        return self.factor * self._by_profile(decode, context_tokens, prefill)

    def reading_seconds(self, point: int, tokens: int) -> float:
        """`seconds` of a step that reads `tokens` at one point and decodes nothing; asked for every waiting request."""
        cost = self._points[point]
        base = cost.step_base_nanoseconds + cost.prefill_base_nanoseconds
        return self.factor * 1e-9 * (base + cost.prefill_per_token_nanoseconds * tokens)

    def observe(
        self, decode: Mapping[int, int], context_tokens: int, prefill: Mapping[int, int], seconds: float
    ) -> None:
        """Learn from a step that took `seconds`."""
        expected = self._by_profile(decode, context_tokens, prefill) if self.known else 0.0
        if expected > 0:
            ratio = min(max(seconds / expected, self.factor / MOST_A_STEP), self.factor * MOST_A_STEP)
            self.factor += SMOOTHING * (ratio - self.factor)

    def _by_profile(self, decode: Mapping[int, int], context_tokens: int, prefill: Mapping[int, int]) -> float:
        sequences = sum(decode.values())
        nanoseconds = float(max((self._points[p].step_base_nanoseconds for p in decode or prefill), default=0))
        for point, count in decode.items():
            cost = self._points[point]
            nanoseconds += count * cost.step_per_sequence_nanoseconds
            nanoseconds += cost.step_per_kilotoken_nanoseconds * context_tokens / 1000 * count / sequences
        nanoseconds += max((self._points[point].prefill_base_nanoseconds for point in prefill), default=0)
        nanoseconds += sum(self._points[p].prefill_per_token_nanoseconds * count for p, count in prefill.items())
        return nanoseconds * 1e-9
