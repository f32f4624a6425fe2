"""A profile that an artifact brings along, corrected for this machine by a few steps.

An artifact may hold `prism_profiles/ACCELERATOR.json`, made by `prism-runtime profile` on such a machine. It spares a
pod the sweep over all shapes and operating points when it starts. Machines of one name still differ, and other work
runs beside them, so the engine takes some steps first: one factor on all costs follows from them, and too large a one
says that the profile is of another kind of machine.
"""

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from prism_api.points import Ladder
from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.profiling import Limits, StepSample

log = logging.getLogger(__name__)

FOLDER = "prism_profiles"
MOST_FACTOR = 4.0
"""Beyond this factor, either way, costs of a profile do not even keep their proportions."""
LONGEST_NOTE = 512
COSTS = tuple(name for name in PointProfile.model_fields if name.endswith("_nanoseconds"))


def read_shipped(artifact: Path, accelerator: str, limits: Limits, ladder: Ladder) -> Profile | None:
    """The artifact's profile for the accelerator; None, and a reason in the log, where it has none that fits.

    It must price every point of the ladder, and have the engine's own limits: for larger batches it would promise them.
    """
    path = artifact / FOLDER / f"{accelerator}.json"
    if not path.is_file():
        return None
    try:
        profile = Profile.model_validate_json(path.read_text())
        _require_fit(profile, limits, ladder)
    except (OSError, ValueError) as error:
        log.warning("shipped profile not used", extra={"file": str(path), "reason": str(error)})
        return None
    return profile


def _require_fit(profile: Profile, limits: Limits, ladder: Ladder) -> None:
    """Raises ValueError."""
    if missing := [name for name in ladder.names if name not in profile.points]:
        raise ValueError(f"it has no cost for {', '.join(missing)}")
    for name in ("max_sequences", "kv_tokens", "prefill_tokens_per_step"):
        if (theirs := getattr(profile, name)) != (ours := getattr(limits, name)):
            raise ValueError(f"its {name} is {theirs}, the engine's {ours}")


def corrected(profile: Profile, full: PointProfile, samples: Sequence[StepSample]) -> Profile | None:
    """The profile with all costs multiplied by what these steps at `full` took of that point's cost, in the median.

    None, and a reason in the log, if they differ by more than MOST_FACTOR.
    """
    priced = [(sample.seconds, _expected_s(full, sample)) for sample in samples]
    factor = statistics.median([seconds / expected for seconds, expected in priced if expected] or [0.0])
    if not 1 / MOST_FACTOR <= factor <= MOST_FACTOR:
        log.warning("the shipped profile is not this machine's", extra={"factor": round(factor, 3)})
        return None
    points = {name: _scaled(point, factor) for name, point in profile.points.items()}
    note = f"{profile.provenance}; costs times {factor:.2f}, as {len(samples)} steps at start took"
    return profile.model_copy(update={"points": points, "provenance": note[:LONGEST_NOTE]})


def _expected_s(cost: PointProfile, sample: StepSample) -> float:
    return cost.step_seconds(sample.decode_sequences, sample.context_tokens, sample.prefill_tokens)


def _scaled(point: PointProfile, factor: float) -> PointProfile:
    return point.model_copy(update={name: round(getattr(point, name) * factor) for name in COSTS})
