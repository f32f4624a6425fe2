"""The report: what a pod holds, what it runs at, its load and its counters. See `prism_api.control.Report`."""

import secrets
from dataclasses import dataclass, field

from prism_api.control import (
    EffectivePoint,
    Load,
    ModelReference,
    PodReference,
    Report,
    RuntimeReference,
    Steps,
    TlsState,
)
from prism_api.profile import Profile
from prism_runtime.engine.loop import EngineLoop
from prism_runtime.server.accounting import Accounting
from prism_runtime.server.drain import Lifecycle


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """Who this process is, from its boot values; never changes. A restart is a new `start_id`."""

    name: str
    uid: str
    image_digest: str
    accelerator: str
    model_digest: str
    start_id: str = field(default_factory=lambda: secrets.token_hex(8))


class Reporter:
    """Builds reports from live state."""

    def __init__(
        self,
        pod: PodIdentity,
        engine_loop: EngineLoop,
        accounting: Accounting,
        lifecycle: Lifecycle,
        profile: Profile | None,
    ) -> None:
        self._pod = pod
        self._engine_loop = engine_loop
        self._accounting = accounting
        self._lifecycle = lifecycle
        self._profile = profile

    def report(self, *, tls: TlsState | None = None, ignored: list[str] | None = None) -> Report:
        load, totals = self._engine_loop.engine.load(), self._engine_loop.totals
        return Report(
            pod=PodReference(name=self._pod.name, uid=self._pod.uid),
            start_id=self._pod.start_id,
            runtime=RuntimeReference(image_digest=self._pod.image_digest, accelerator=self._pod.accelerator),
            model=ModelReference(digest=self._pod.model_digest),
            held=self._engine_loop.held(),
            effective=self._effective(),
            load=Load(
                running=load.running,
                waiting=load.waiting,
                kv_blocks=load.kv_blocks,
                kv_blocks_used=load.kv_blocks_used,
                preemptions=load.preemptions,
            ),
            classes=self._accounting.snapshot(),
            steps=Steps(count=totals.count, busy_ms=round(totals.busy_s * 1000)),
            ready=self._lifecycle.ready,
            draining=self._lifecycle.draining,
            tls=tls,
            profile=self._profile,
            ignored=ignored or [],
        )

    def _effective(self) -> list[EffectivePoint]:
        """From the plan that is live in the engine, not from the one that was ordered."""
        plan, names = self._engine_loop.engine.plan, self._engine_loop.engine.ladder.names
        return [
            EffectivePoint(
                class_name=name, point=names[plan.class_point[service_class.slot]], plan_version=plan.version
            )
            for name, service_class in self._engine_loop.classes.live.items()
        ]
