"""Measures a profile: short runs of the real engine at every operating point, and a least-squares fit of step times.

The model is `prism_api.profile`'s. Step times are wall clock on purpose: a planner needs what a request will wait,
competing load included; `fit_error_permille` tells how well the line fits.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prism_api.profile import PointProfile, Profile
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.loop import SteppingEngine
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.types import Plan, Request, Sampling, StepReport

DECODE_STEPS = 6
"""Steps measured at each shape. The fit takes all of them but the first step of a short run, which warms up."""

OUTLIER_FACTOR = 2.0

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of the engine that bound the sweep and go into the profile."""

    max_sequences: int
    max_context_tokens: int
    prefill_tokens_per_step: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class StepSample:
    decode_sequences: int
    context_tokens: int
    prefill_tokens: int
    seconds: float


def measure_profile(
    engine: SteppingEngine,
    limits: Limits,
    *,
    accelerator: str,
    measured: str = "at start",
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda shape: None,
) -> Profile:
    """Profile of an idle engine; leaves it idle. Nobody else may step it meanwhile.

    `measured` is the part of the provenance that only the caller knows: when, or on what.

    Raises RuntimeError if the engine has work already.
    """
    if engine.has_work:
        raise RuntimeError("a profile is measured on an idle engine; this one has requests")
    before, names = engine.plan, engine.ladder.names
    samples: dict[str, list[StepSample]] = {name: [] for name in names}
    ids = itertools.count()
    for sequences, prompt_tokens in _shapes(limits):
        progress(f"{sequences} sequences of {prompt_tokens} prompt tokens")
        # Points take turns at each shape, so that a busy moment of the machine does not fall on one of them alone.
        for index, name in enumerate(names):
            engine.set_plan(Plan(before.version, (index,) * CLASS_SLOTS))
            samples[name] += _run_shape(engine, sequences, prompt_tokens, clock, ids)
    engine.set_plan(before)
    engine.step()
    return Profile(
        accelerator=accelerator,
        provenance=f"measured {measured}: wall clock of {len(samples[names[0]])} engine steps a point, least squares",
        max_sequences=limits.max_sequences,
        kv_tokens=limits.kv_tokens,
        prefill_tokens_per_step=limits.prefill_tokens_per_step,
        points={name: fit_point(taken) for name, taken in samples.items()},
    )


def probe(engine: SteppingEngine, limits: Limits, clock: Callable[[], float] = time.perf_counter) -> list[StepSample]:
    """Some steps at the last operating point, `full`: one sequence, and as many as fit. Leaves an idle engine idle.

    Nobody else may step it meanwhile.
    """
    before, ids = engine.plan, itertools.count()
    engine.set_plan(Plan(before.version, (len(engine.ladder) - 1,) * CLASS_SLOTS))
    few, many = _shapes(limits)[0], _shapes(limits)[-1]
    samples = [sample for shape in (few, many) for sample in _run_shape(engine, *shape, clock, ids)]
    engine.set_plan(before)
    engine.step()
    return samples


def fit_point(samples: list[StepSample]) -> PointProfile:
    """Non-negative least squares of the profile's formula, and the mean absolute error relative to the mean step.

    Errors count relative to their step: one that reads a prompt takes ten times one that does not, and fitted by its
    seconds the line would tell nothing of the steps that make most tokens. Fitted twice: steps that took over twice the
    first fit's time met something else on the machine and are left out of the second, but not of the error, which so
    tells how quiet the machine was.
    """
    rows = [
        (1.0, s.decode_sequences, s.context_tokens / 1000, 1.0 if s.prefill_tokens else 0.0, s.prefill_tokens)
        for s in samples
    ]
    shape, seconds = np.array(rows, dtype=np.float64), np.array([s.seconds for s in samples])
    relative = shape / seconds[:, None]
    cost = _non_negative_least_squares(relative)
    usual = seconds <= OUTLIER_FACTOR * (shape @ cost)
    cost = _non_negative_least_squares(relative[usual])
    error = float(np.abs(shape @ cost - seconds).mean() / seconds.mean())
    base, sequence, kilotoken, prefill_base, prefill_token = (round(float(c) * 1e9) for c in cost)
    return PointProfile(
        step_base_nanoseconds=base,
        step_per_sequence_nanoseconds=sequence,
        step_per_kilotoken_nanoseconds=kilotoken,
        prefill_base_nanoseconds=prefill_base,
        prefill_per_token_nanoseconds=prefill_token,
        fit_error_permille=min(10_000, round(error * 1000)),
    )


def _non_negative_least_squares(relative: FloatArray) -> FloatArray:
    """The costs at which rows of step shapes over the steps' seconds are as near to 1 as can be.

    Costs cannot be negative, so a column whose coefficient is negative is dropped and the rest fitted again.
    """
    columns = list(range(relative.shape[1]))
    while True:
        cost = np.zeros(relative.shape[1])
        cost[columns] = np.linalg.lstsq(relative[:, columns], np.ones(len(relative)), rcond=None)[0]
        if cost.min() >= 0 or len(columns) == 1:
            return cost.clip(min=0)
        columns.remove(int(cost.argmin()))


def _shapes(limits: Limits) -> list[tuple[int, int]]:
    """(sequences, prompt tokens): one and many sequences, short and long contexts, inside the engine's limits."""
    room = limits.max_context_tokens - DECODE_STEPS - 2
    prompts = sorted({min(room, 16), min(room, limits.max_context_tokens // 3)})
    batches = sorted({1, max(1, limits.max_sequences // 4), limits.max_sequences})
    fits = [(b, p) for b in batches for p in prompts if b * (p + DECODE_STEPS + 16) <= limits.kv_tokens]
    return fits or [(1, min(room, 16))]


def _run_shape(
    engine: SteppingEngine, sequences: int, prompt_tokens: int, clock: Callable[[], float], ids: "itertools.count[int]"
) -> list[StepSample]:
    """Timed steps of one batch from its prompts to its last token.

    Cost ignores content, but every prompt begins with a number of its own, in token ids 0 and 1: one that is known
    already would not be computed.
    """
    for _ in range(sequences):
        number = next(ids)
        prompt = [number >> bit & 1 for bit in range(BLOCK_TOKENS)] + [1] * prompt_tokens
        sampling = Sampling(max_tokens=DECODE_STEPS + 1, temperature=0.0)
        engine.submit(Request(f"profile-{number}", tuple(prompt[:prompt_tokens]), sampling))
    samples = []
    while engine.has_work:
        begun_s = clock()
        report: StepReport = engine.step()
        elapsed_s = clock() - begun_s
        if not report.idle:
            samples.append(StepSample(report.decode_sequences, report.context_tokens, report.prefill_tokens, elapsed_s))
    return samples[1:] if len(samples) > 2 and prompt_tokens < 32 else samples
