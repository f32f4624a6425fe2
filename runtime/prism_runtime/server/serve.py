"""From settings to a serving process: load the engine, price it, run it. The commands `serve` and `profile`."""

import asyncio
import hashlib
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

from prism_api.base import NAME_PATTERN
from prism_api.manifest import MANIFEST_NAME
from prism_api.profile import Profile
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.loop import SteppingEngine
from prism_runtime.engine.pace import PaceError, Pacer, load_profile
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.profiling import Limits, measure_profile, probe
from prism_runtime.engine.shipped_profile import corrected, read_shipped
from prism_runtime.native import levels, processor_name
from prism_runtime.server import logs
from prism_runtime.server.app import ServingProcess, read_eos_token_ids
from prism_runtime.server.settings import ServeSettings

log = logging.getLogger(__name__)

DEFAULT_MAX_SEQUENCES = 16
DEFAULT_PREFILL_TOKENS_PER_STEP = 512


class SettingsError(ValueError):
    """Settings that contradict each other; the message names the flags."""


def serve(settings: ServeSettings) -> int:
    """Exit status of `prism-runtime serve`: 0 after a drain, 1 with one line on stderr if it cannot start."""
    started_s = time.monotonic()
    logs.configure(settings.log_level)
    try:
        asyncio.run(_serve(settings, started_s))
    except (SettingsError, PaceError, OSError, ValueError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        log.error("cannot serve", extra={"reason": str(message)})
        return 1
    return 0


async def _serve(settings: ServeSettings, started_s: float) -> None:
    if settings.tls_dir and settings.local_control:
        raise SettingsError(
            "--local-control and --tls-dir exclude each other: the operator and a local user would overtake each "
            "other's directives; drop one of them"
        )
    if settings.accelerator and not re.fullmatch(NAME_PATTERN, settings.accelerator):
        raise SettingsError(
            f"--accelerator must be lower-case letters, digits and '-', for example 'h100'; "
            f"found '{settings.accelerator}'"
        )
    pace = load_profile(settings.pace) if settings.pace else None
    limits = Limits(
        max_sequences=settings.max_sequences or (pace.max_sequences if pace else DEFAULT_MAX_SEQUENCES),
        max_context_tokens=settings.max_context_tokens,
        prefill_tokens_per_step=settings.prefill_tokens_per_step
        or (pace.prefill_tokens_per_step if pace else DEFAULT_PREFILL_TOKENS_PER_STEP),
        kv_tokens=settings.kv_tokens or (pace.kv_tokens if pace else 0),
    )
    engine = load_engine(
        settings.artifact, limits, settings.threads, policy=settings.policy, shed_above=settings.shed_above
    )
    pacer = Pacer(pace, engine.ladder) if pace else None
    profile = pace
    if profile is None and not settings.no_profile:
        profile = profile_of(engine, settings.artifact, kv_sized(limits), settings.accelerator or "cpu")
    if profile:
        engine.costs.take(profile)
    process = ServingProcess(
        engine,
        settings,
        model_digest=artifact_digest(settings.artifact),
        eos_token_ids=read_eos_token_ids(settings.artifact),
        block_tokens=BLOCK_TOKENS,
        profile=profile,
        pacer=pacer,
        started_s=started_s,
    )
    await process.run()


def profile_of(engine: SteppingEngine, artifact: Path, limits: Limits, accelerator: str) -> Profile:
    """What the artifact brings for this accelerator, corrected by some steps, or else measured at every point."""
    if shipped := read_shipped(artifact, accelerator, limits, engine.ladder):
        profile = corrected(shipped, shipped.points[engine.ladder.names[-1]], probe(engine, limits))
        if profile:
            log.info("shipped profile corrected", extra={"provenance": profile.provenance})
            return profile
    profile = measure_profile(engine, limits, accelerator=accelerator)
    log.info("profile measured", extra={"points": list(profile.points)})
    return profile


def print_profile(
    artifact: Path, *, accelerator: str, max_sequences: int, max_context_tokens: int, threads: int
) -> int:
    """Exit status of `prism-runtime profile`; the profile goes to standard output, progress to standard error."""
    limits = Limits(max_sequences, max_context_tokens, DEFAULT_PREFILL_TOKENS_PER_STEP, kv_tokens=0)
    engine = load_engine(artifact, limits, threads)
    profile = measure_profile(
        engine,
        kv_sized(limits),
        accelerator=accelerator,
        measured=f"on {processor_name()} ({levels()[0].name}), threads: {threads}, {artifact}",
        progress=lambda shape: print(f"measuring {shape}", file=sys.stderr),
    )
    print(json.dumps(profile.to_wire(), indent=2))
    return 0


def load_engine(artifact: Path, limits: Limits, threads: int, **settings: Any) -> Engine:
    """An engine of these limits; `settings` are more of the constructor's."""
    return Engine.from_artifact(
        artifact,
        max_sequences=limits.max_sequences,
        max_context_tokens=limits.max_context_tokens,
        kv_tokens=limits.kv_tokens or None,
        prefill_tokens_per_step=limits.prefill_tokens_per_step,
        threads=threads,
        classes=CLASS_SLOTS,
        **settings,
    )


def kv_sized(limits: Limits) -> Limits:
    """The limits with the engine's own default for the cache: room for every sequence at full context."""
    kv_tokens = limits.kv_tokens or limits.max_sequences * limits.max_context_tokens
    return Limits(limits.max_sequences, limits.max_context_tokens, limits.prefill_tokens_per_step, kv_tokens)


def artifact_digest(artifact: Path) -> str:
    """What `PrismModel.spec.digest` names: the sha256 of the manifest, which lists every other file's."""
    return "sha256:" + hashlib.sha256((artifact / MANIFEST_NAME).read_bytes()).hexdigest()
