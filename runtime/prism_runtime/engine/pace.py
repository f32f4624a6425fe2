"""Pace: makes each step last at least as long as a profile says, so that a small model takes a large one's time.

Used by demos and tests of the operator on machines without accelerators. Tokens, queues and switches stay real; only
time is prescribed. A step that took longer than its profile is *lag*: it is counted, never caught up, so that a run
that could not keep its pace says so.
"""

from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from prism_api.points import Ladder
from prism_api.profile import Profile
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.types import StepReport

SHIPPED_PROFILES = resources.files("prism_runtime") / "profiles"


class PaceError(ValueError):
    """The profile cannot pace this model; the message says what would."""


def load_profile(name_or_path: str) -> Profile:
    """Profile of that path (anything with a slash or `.json`), or the shipped one of that name. Raises PaceError."""
    is_path = "/" in name_or_path or name_or_path.endswith(".json")
    source = Path(name_or_path) if is_path else SHIPPED_PROFILES / f"{name_or_path}.json"
    if not source.is_file():
        shipped = sorted(entry.name.removesuffix(".json") for entry in SHIPPED_PROFILES.iterdir())
        raise PaceError(
            f"no profile '{name_or_path}': --pace must be a path to a JSON file or one of the shipped profiles "
            f"({', '.join(shipped)})"
        )
    try:
        return Profile.model_validate_json(source.read_text())
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise PaceError(f"profile '{name_or_path}' cannot be read: {error}") from error


class Pacer:
    """Prices steps by a profile and counts lag. Raises PaceError if the profile lacks a point of the ladder."""

    def __init__(self, profile: Profile, ladder: Ladder) -> None:
        missing = [name for name in ladder.names if name not in profile.points]
        if missing:
            raise PaceError(
                f"profile of '{profile.accelerator}' has no cost for {', '.join(missing)}; it must price every "
                f"point of the model: {', '.join(ladder.names)}"
            )
        self._costs = StepCosts(ladder)
        self._costs.take(profile)
        self.lagging_steps = 0
        self.lag_s = 0.0

    def step_s(self, report: StepReport) -> float:
        """Prescribed duration of a step: of its shape at the operating points in it."""
        return self._costs.seconds(report.decode_at, report.context_tokens, report.prefill_at)

    def rest_s(self, prescribed_s: float, elapsed_s: float) -> float:
        """Time left of a step after `elapsed_s`; a step already over it adds to the lag."""
        if elapsed_s > prescribed_s:
            self.lagging_steps += 1
            self.lag_s += elapsed_s - prescribed_s
            return 0.0
        return prescribed_s - elapsed_s
