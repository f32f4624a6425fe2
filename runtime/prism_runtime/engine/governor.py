"""The governor: which operating point each service class runs at, now.

A pure state machine. It holds the last accepted directive behind its fence, moves each class inside [floor, ceiling]
by saturation between directives, and goes to the safe point when the operator has been silent for the envelope's time
to live. Time is an argument (seconds on one monotonic clock); no thread, no I/O, no log.

    Unmanaged --directive--> Managed --silence for ttl--> Expired --directive--> Managed

Saturation of a class is the larger of (age of its oldest request without a first token / TTFT objective) and (recent
time per output token / TPOT objective). At or above `high` the class steps down one point per dwellDown; it steps up
one point once saturation has stayed at or below `low` for dwellUp. The band between them holds the point: without it
a class whose load sits on one threshold would swing between two points.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from prism_api.control import Admission, ClassDirective, Directive, EnvelopeState, Fence, Held
from prism_api.points import Ladder
from prism_runtime.engine.types import Plan

CLASS_SLOTS = 16
"""Rows of the plan: twice a directive's eight classes, so that one directive may rename all of them while requests of
the old ones still run in rows of their own."""

BOOT_CLASS = "default"
"""The one class of a pod that has never seen a directive."""


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """One class as the door and the governor see it. `slot` is its row in the plan; points are ladder indices."""

    name: str
    slot: int
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    shed: bool = False
    ordered: int = 0
    floor: int = 0
    ceiling: int = 0


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of the directive in force. Never changed in place: a reader on another thread keeps a whole one."""

    live: Mapping[str, ServiceClass]
    default: str
    retired: Mapping[str, int]
    """Classes of earlier directives and their slots, longest retired first; their last requests may still run."""

    def resolve(self, name: str | None) -> ServiceClass:
        """The class of that name, or the default class if the name is absent or unknown."""
        return self.live.get(name or self.default) or self.live[self.default]


@dataclass(frozen=True, slots=True)
class ClassSignals:
    """What a class feels: age of its oldest request without a first token, and its recent time per output token."""

    queue_wait_s: float = 0.0
    tpot_s: float | None = None


class SwapCause(StrEnum):
    DIRECTIVE = "Directive"
    GOVERNOR = "Governor"
    ENVELOPE_EXPIRED = "EnvelopeExpired"


@dataclass(frozen=True, slots=True)
class Swap:
    """A new plan, why it came, and since when it was due (receipt of the directive, or the tick that decided)."""

    plan: Plan
    cause: SwapCause
    due_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A directive that was not applied: HTTP status (403, 409, 412, 422) and the reason."""

    status: int
    error: str


@dataclass(slots=True)
class _Motion:
    """Where a class stands, when it last moved, and since when its saturation has stayed at or below `low`."""

    point: int
    moved_s: float
    calm_since_s: float | None = None


class Governor:
    """Holds fence, envelope and classes. Callers serialise `apply` and `tick`; `classes` may be read at any time.

    boot_point   point of the one boot class until a directive comes
    service_uid  the service this pod belongs to; None binds it to the first directive's
    Raises KeyError if `boot_point` is not on the ladder.
    """

    def __init__(
        self, ladder: Ladder, *, model_digest: str, boot_point: str, now_s: float, service_uid: str | None = None
    ) -> None:
        boot = ladder.index(boot_point)
        self.ladder = ladder
        self.classes = ClassTable(
            live={BOOT_CLASS: ServiceClass(BOOT_CLASS, slot=0, ordered=boot, floor=boot, ceiling=boot)},
            default=BOOT_CLASS,
            retired={},
        )
        self.plan = Plan(version=1, class_point=(boot,) * CLASS_SLOTS)
        self.state = EnvelopeState.UNMANAGED
        self._model_digest = model_digest
        self._service_uid = service_uid
        self._directive: Directive | None = None
        self._received_s = now_s
        self._directive_due_s: float | None = None
        self._motion = {BOOT_CLASS: _Motion(boot, now_s)}

    # -- directives ---------------------------------------------------------------------------------------------

    def apply(self, directive: Directive, now_s: float) -> Held | Refused:
        """Take a directive, renew an identical one, or refuse it with the state unchanged (api contract 1, 4, 6)."""
        refused = self._judge(directive)
        if refused:
            return refused
        if directive != self._directive:
            self._adopt(directive, now_s)
            self._directive_due_s = now_s
        elif self.state is EnvelopeState.EXPIRED:
            # The same directive after a silence: its orders hold again, not the safe point the pod went to meanwhile.
            for service_class in self.classes.live.values():
                self._motion[service_class.name] = _Motion(service_class.ordered, now_s)
            self._directive_due_s = now_s
        self._received_s = now_s
        self.state = EnvelopeState.MANAGED
        return self.held(now_s)

    def held(self, now_s: float) -> Held:
        """The fence in force, its age and what is left of its time to live."""
        if self._directive is None:
            return Held()
        age_ms = max(0, round((now_s - self._received_s) * 1000))
        return Held(
            epoch=self._directive.epoch,
            sequence=self._directive.sequence,
            age_ms=age_ms,
            ttl_left_ms=max(0, self._directive.envelope.ttl_ms - age_ms),
            state=self.state,
        )

    def _judge(self, directive: Directive) -> Refused | None:
        if self._service_uid is not None and directive.service.uid != self._service_uid:
            return Refused(
                403,
                f"service.uid is '{directive.service.uid}', this pod belongs to '{self._service_uid}'; "
                f"a pod changes its service only by being replaced",
            )
        if directive.model_digest is not None and directive.model_digest != self._model_digest:
            return Refused(
                412, f"modelDigest is '{directive.model_digest}', this pod serves artifact '{self._model_digest}'"
            )
        held = self._directive
        if held is not None and directive.fence < held.fence:
            return Refused(409, f"fence {_show(directive.fence)} is lower than the held fence {_show(held.fence)}")
        if held is not None and directive.fence == held.fence and directive != held:
            return Refused(
                409, f"fence {_show(directive.fence)} is held already with another body; send a higher sequence"
            )
        return self._judge_points(directive)

    def _judge_points(self, directive: Directive) -> Refused | None:
        known = ", ".join(self.ladder.names)
        named = {"envelope.safePoint": directive.envelope.safe_point}
        for c in directive.classes:
            named |= {f"classes[{c.name}].{field}": getattr(c, field) for field in ("point", "floor", "ceiling")}
        for where, name in named.items():
            if name not in self.ladder:
                return Refused(422, f"{where} is '{name}'; known points: {known}")
        for c in directive.classes:
            point, floor, ceiling = (self.ladder.index(name) for name in (c.point, c.floor, c.ceiling))
            if floor > ceiling:
                return Refused(
                    422, f"classes[{c.name}].floor '{c.floor}' is above ceiling '{c.ceiling}'; ladder: {known}"
                )
            if not floor <= point <= ceiling:
                return Refused(
                    422,
                    f"classes[{c.name}].point '{c.point}' is outside ['{c.floor}', '{c.ceiling}']; ladder: {known}",
                )
        return None

    def _adopt(self, directive: Directive, now_s: float) -> None:
        """A class whose ordered point is repeated keeps the governor's own position, clamped to the new range.

        Else every renewal (the operator counts up its sequence for any change of any class) would undo the pod's own
        moves and start its dwell times anew.
        """
        was_managed = self.state is EnvelopeState.MANAGED
        before, self.classes = self.classes, _assign_slots(self.classes, directive, self.ladder)
        motion: dict[str, _Motion] = {}
        for c in self.classes.live.values():
            held, known = self._motion.get(c.name), before.live.get(c.name)
            if was_managed and held and known and known.ordered == c.ordered:
                point = min(max(held.point, c.floor), c.ceiling)
                motion[c.name] = held if point == held.point else _Motion(point, now_s)
            else:
                motion[c.name] = _Motion(c.ordered, now_s)
        self._motion = motion
        self._directive = directive
        self._service_uid = directive.service.uid

    # -- moves --------------------------------------------------------------------------------------------------

    def tick(self, signals: Mapping[str, ClassSignals], now_s: float) -> Swap | None:
        """Move by load or towards the safe point; the swap to make before the next step, or None to go on."""
        cause = SwapCause.GOVERNOR
        if self._directive is not None:
            if (now_s - self._received_s) * 1000 >= self._directive.envelope.ttl_ms:
                self.state = EnvelopeState.EXPIRED
            if self.state is EnvelopeState.EXPIRED:
                cause = SwapCause.ENVELOPE_EXPIRED
                self._seek_safe_point(self._directive, now_s)
            else:
                for service_class in self.classes.live.values():
                    self._follow_load(service_class, signals.get(service_class.name, ClassSignals()), now_s)
        return self._swap(cause, now_s)

    @property
    def settled(self) -> bool:
        """True if the last plan given out already holds every move decided so far."""
        return self.plan.class_point == self._class_point()

    def point_of(self, service_class: str) -> int:
        """Ladder index that a live class stands at."""
        return self._motion[service_class].point

    def _follow_load(self, c: ServiceClass, signals: ClassSignals, now_s: float) -> None:
        assert self._directive is not None
        settings, motion = self._directive.governor, self._motion[c.name]
        saturation_permille = _saturation(c, signals) * 1000
        if saturation_permille > settings.low:
            motion.calm_since_s = None
        elif motion.calm_since_s is None:
            motion.calm_since_s = now_s
        since_move_ms = (now_s - motion.moved_s) * 1000
        if saturation_permille >= settings.high:
            if motion.point > c.floor and since_move_ms >= settings.dwell_down_ms:
                self._motion[c.name] = _Motion(motion.point - 1, now_s)
        elif motion.calm_since_s is not None and motion.point < c.ceiling:
            calm_ms = (now_s - motion.calm_since_s) * 1000
            if min(calm_ms, since_move_ms) >= settings.dwell_up_ms:
                self._motion[c.name] = _Motion(motion.point + 1, now_s, calm_since_s=now_s)

    def _seek_safe_point(self, directive: Directive, now_s: float) -> None:
        """Down at once, up one point per dwellUp; never below a class's floor, which carries its quality floor."""
        safe_point = self.ladder.index(directive.envelope.safe_point)
        for c in self.classes.live.values():
            motion, target = self._motion[c.name], max(safe_point, c.floor)
            if motion.point > target:
                self._motion[c.name] = _Motion(target, now_s)
            elif motion.point < target and (now_s - motion.moved_s) * 1000 >= directive.governor.dwell_up_ms:
                self._motion[c.name] = _Motion(motion.point + 1, now_s)

    def _class_point(self) -> tuple[int, ...]:
        """Rows without a live class follow the default class: the last requests of a retired class end there."""
        rows = [self._motion[self.classes.default].point] * CLASS_SLOTS
        for c in self.classes.live.values():
            rows[c.slot] = self._motion[c.name].point
        return tuple(rows)

    def _swap(self, cause: SwapCause, now_s: float) -> Swap | None:
        due_s, self._directive_due_s = self._directive_due_s, None
        rows = self._class_point()
        if rows == self.plan.class_point:
            return None
        self.plan = Plan(version=self.plan.version + 1, class_point=rows)
        if due_s is not None:
            return Swap(self.plan, SwapCause.DIRECTIVE, due_s)
        return Swap(self.plan, cause, now_s)


def _show(fence: Fence) -> str:
    return f"({fence.epoch}, {fence.sequence})"


def _saturation(c: ServiceClass, signals: ClassSignals) -> float:
    """Share of the tighter objective that is used up; 0 for a class without objectives or traffic."""
    wait = signals.queue_wait_s / c.ttft_s if c.ttft_s else 0.0
    pace = signals.tpot_s / c.tpot_s if c.tpot_s and signals.tpot_s is not None else 0.0
    return max(wait, pace)


def _assign_slots(table: ClassTable, directive: Directive, ladder: Ladder) -> ClassTable:
    """Known names keep their slots, live or retired; a new name takes a free slot, else the longest retired one's."""
    names = {c.name for c in directive.classes}
    slot_of = {**table.retired, **{c.name: c.slot for c in table.live.values()}}
    retired = {name: slot for name, slot in slot_of.items() if name not in names}
    free = [slot for slot in range(CLASS_SLOTS) if slot not in slot_of.values()]
    live: dict[str, ServiceClass] = {}
    for c in directive.classes:
        if c.name in slot_of:
            slot = slot_of[c.name]
        elif free:
            slot = free.pop(0)
        else:
            slot = retired.pop(next(iter(retired)))
        live[c.name] = replace(_service_class(c, ladder), slot=slot)
    return ClassTable(live=live, default=directive.default_class, retired=retired)


def _service_class(c: ClassDirective, ladder: Ladder) -> ServiceClass:
    return ServiceClass(
        name=c.name,
        slot=0,
        priority=c.priority,
        ttft_s=c.ttft_ms / 1000 if c.ttft_ms else None,
        tpot_s=c.tpot_ms / 1000 if c.tpot_ms else None,
        shed=c.admission is Admission.SHED,
        ordered=ladder.index(c.point),
        floor=ladder.index(c.floor),
        ceiling=ladder.index(c.ceiling),
    )
