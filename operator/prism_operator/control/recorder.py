"""Decision record: every move of a knob as one JSON line in the log, a count, an Event, and an entry in the status."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from prism_api.service_status import Decision
from prism_operator import metrics
from prism_operator.control.events import Events, Regarding

KEPT = 5

logger = logging.getLogger("prism_operator.decisions")


@dataclass(frozen=True, slots=True)
class Move:
    """One move of one knob."""

    kind: Literal["Budget", "Replicas"]
    class_name: str | None
    before: str
    after: str
    reason: str
    message: str
    event: str
    """Reason of the Event, a word of the published list."""


class Recorder:
    def __init__(self, events: Events) -> None:
        self._events = events

    def record(self, regarding: Regarding, moves: Iterable[Move], earlier: Iterable[Decision]) -> list[Decision]:
        """Log, count and post each move; the decisions for the status, newest first."""
        decisions = list(earlier)
        for move in moves:
            decision = Decision(
                time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                kind=move.kind,
                class_name=move.class_name,
                from_=move.before[:32],
                to=move.after[:32],
                reason=move.reason[:64],
                message=move.message[:512],
            )
            line = {"namespace": regarding.namespace, "service": regarding.name, **decision.to_wire()}
            logger.info(json.dumps(line, separators=(",", ":")))
            metrics.DECISIONS.labels(move.kind, move.reason).inc()
            subject = f"class '{move.class_name}'" if move.class_name else "replicas"
            note = f"{subject}: {move.before} -> {move.after} ({move.reason}); {move.message}"
            self._events.post(regarding, move.event, f"Move{move.kind}", note)
            decisions.insert(0, decision)
        return decisions[:KEPT]
