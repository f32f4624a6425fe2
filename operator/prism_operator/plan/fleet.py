"""Arbitration between services: who may have how many replicas under caps that all of them share.

A service's load can be held in several ways: more replicas at higher points, or fewer at lower ones. For each row of
points the cheapest count is fixed, so a service is a list of choices, each with a price, accelerators and a value (rate
times relative quality, summed over classes). Picking one choice a service under a cap is the multiple-choice knapsack.

    1. drop choices that cost more and are worth no more; keep the upper concave hull of (cost, value)
    2. everybody starts at the cheapest choice, the floors
    3. take the hull step with the largest gain in value for its cost that still fits, until none does
    4. fill what is left with single choices, hull or not, the largest gain first
    5. share out what is left then, a replica each in turn: nobody needs it now, but a burst does not wait for the next
       arbitration, and idle accelerators that nobody may order are of no use

Under one cap this is the optimum of the relaxed problem up to the one step that does not fit, so what is lost is at
most that step's value (Sinha and Zoltners 1979). Under several caps it is a heuristic; a step's cost is then its
largest share of what the floors left of a cap. Cost O(S*P*log(S*P)) for S services with P points.

`PriorityThenMarginalQuality`: floors are granted in order of priority, then each priority band climbs before the next,
so no band lives above its floor on what a higher one lacks. If caps do not even hold the floors, the lowest priorities
get what is left, down to nothing: they are named, and shed at their own doors.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Protocol

from prism_api.profile import Profile
from prism_operator.plan import capacity, demand
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.reasons import Reason, Status
from prism_operator.plan.types import DemandState, ServicePolicy

WORTH_A_CHANGE = 0.01
"""Grants change only if the fleet's value rises by more than this share, or if the old ones do not fit any more."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to hold a service's load."""

    replicas: int
    points: Mapping[str, str]
    value: float
    """Sum over classes of rate times relative quality."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A service's choices. The first is the least that it needs: every class at its floor."""

    service: str
    priority: int
    """Highest priority of its classes."""
    price_per_hour: Decimal | None
    accelerators: int
    """Of one replica."""
    choices: tuple[Choice, ...]
    most: int
    """Replicas that its spec allows."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What all services share. None: no such cap."""

    per_hour: Decimal | None = None
    accelerators: int | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """What one service may have, and why not more."""

    service: str
    replicas: int
    points: Mapping[str, str]
    status: Status
    reason: Reason
    message: str
    rejected: str = ""
    """The best alternative and why it was not taken; empty where there was none."""
    spare: int = 0
    """Replicas that it may order beyond these if its load rises before the next arbitration."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Grants by service. `value` is what they are worth together, `unserved` who lacks its floor."""

    status: Status
    reason: Reason
    message: str
    grants: Mapping[str, Grant] = field(default_factory=dict)
    value: float = 0.0
    unserved: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{name}={grant.replicas}+{grant.spare}" for name, grant in sorted(self.grants.items()))
        return f"fleet {self.status} {self.reason}: {counts}; {self.message}"


class PriceUnknown(Exception):
    """A cost cap over a service without a price: unknown is not free."""


def mean_loads(state: DemandState, policy: ServicePolicy) -> list[ClassLoad] | None:
    """The busy classes' loads over the long window; None if any is unknown, which is not zero."""
    loads = []
    for class_policy in policy.classes:
        rate = demand.long_rate(state, class_policy.name, policy)
        if rate is None:
            return None
        if rate.arrivals == 0:
            continue
        lengths = demand.mean_lengths(state, class_policy.name)
        if lengths is None:
            return None
        loads.append(ClassLoad(class_policy, rate.per_s, lengths))
    return loads


def claim(
    service: str, policy: ServicePolicy, loads: Sequence[ClassLoad], profile: Profile, accelerators: int
) -> Claim | None:
    """The choices of one service; None if its profile lacks a point, and then no cap can be planned for it.

    Every point of the ladder is tried for all classes at once, raised to each class's floor: P choices, not P^classes.
    """
    ladder = policy.ladder
    choices: list[Choice] = []
    floors = {one.name: one.floor for one in policy.classes}
    headroom = 1 + policy.effective.headroom
    for position in range(ladder.index(policy.max_point) + 1):
        name = ladder.points[position].name
        points = {one: ladder.clamp(name, floor, policy.max_point) for one, floor in floors.items()}
        if choices and choices[-1].points == points:
            continue
        need = capacity.replicas_for(loads, points, profile)
        if need is None:
            return None
        wanted = math.ceil(min(headroom * need, 1e6) - _ROUNDING)
        replicas = max(1, policy.min_replicas, wanted)
        if policy.max_replicas is not None:
            replicas = min(replicas, policy.max_replicas)
        value = sum(load.per_s * float(ladder[points[load.policy.name]].relative_quality) for load in loads)
        choices.append(Choice(replicas, points, value))
    priority = max(one.priority for one in policy.classes)
    most = choices[-1].replicas if policy.max_replicas is None else policy.max_replicas
    return Claim(service, priority, policy.price_per_hour, accelerators, tuple(choices), most)


def arbitrate(claims: Iterable[Claim], caps: Caps, before: FleetPlan | None = None) -> FleetPlan:
    """Grants that fit the caps. Raises PriceUnknown if a cost cap meets a service without a price.

    Independent of the order of `claims`. Keeps the grants of `before` where nothing better than `WORTH_A_CHANGE` is
    found and they still fit what is claimed now.
    """
    ordered = sorted(claims, key=lambda one: (-one.priority, one.service))
    if caps.per_hour is not None and (unknown := [one.service for one in ordered if one.price_per_hour is None]):
        raise PriceUnknown(
            f"the fleet's cost cap is {caps.per_hour}, but {', '.join(unknown[:5])} have no price; "
            "set `pools[].pricePerHour`, or remove the cap"
        )
    if not ordered:
        return FleetPlan(Status.HOLD, Reason.IDLE, "no service claims replicas")
    ledger = Ledger(caps)
    held = _grant_floors(ordered, ledger)
    unserved = tuple(one.service for one in ordered if held[one.service].missing)
    refused = _climb(ordered, held, ledger)
    value = sum(one.choice.value for one in held.values() if not one.missing)
    kept = _kept(ordered, caps, before, value)
    if kept is not None:
        return kept
    grants = {one.service: _grant(one, held[one.service], refused.get(one.service)) for one in ordered}
    if not unserved:
        grants = _with_spare(ordered, grants, ledger)
    return _plan(grants, value, unserved, caps)


def hull(claim: Claim) -> tuple[Choice, ...]:
    """Choices on the upper concave hull of (replicas, value), cheapest first: only these can be optimal steps.

    Within a service price and accelerators are both proportional to replicas, so one hull serves every cap.
    """
    best: dict[int, Choice] = {}
    for choice in claim.choices:
        known = best.get(choice.replicas)
        if known is None or choice.value > known.value:
            best[choice.replicas] = choice
    kept: list[Choice] = []
    for choice in sorted(best.values(), key=lambda one: one.replicas):
        if kept and choice.value <= kept[-1].value + _ROUNDING:
            continue
        while len(kept) >= 2 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return tuple(kept)


def _slope(lower: Choice, upper: Choice) -> float:
    return (upper.value - lower.value) / (upper.replicas - lower.replicas)


@dataclass(slots=True)
class _Held:
    """What one service holds while grants are made, and the hull above it, cheapest first."""

    choice: Choice
    above: tuple[Choice, ...]
    replicas: int
    missing: int

    def rise(self, choice: Choice) -> None:
        self.choice, self.replicas = choice, choice.replicas
        self.above = tuple(one for one in self.above if one.replicas > choice.replicas)


class Priced(Protocol):
    """What one replica takes of the caps; no price counts as free here, and is refused where that matters."""

    @property
    def price_per_hour(self) -> Decimal | None: ...

    @property
    def accelerators(self) -> int: ...


class Ledger:
    """What the caps have left, and what a share of it is measured by: all there was when `measure` was called."""

    def __init__(self, caps: Caps) -> None:
        self._money, self._accelerators = caps.per_hour, caps.accelerators
        self._whole = caps

    @property
    def left(self) -> Caps:
        return Caps(self._money, self._accelerators)

    def measure(self) -> None:
        """From now on shares are shares of what is left now."""
        self._whole = Caps(self._money, self._accelerators)

    def fitting(self, one: Priced, replicas: int) -> int:
        """How many of `replicas` more of this service fit."""
        fit = replicas
        if self._money is not None and one.price_per_hour:
            fit = min(fit, int(self._money // one.price_per_hour))
        if self._accelerators is not None and one.accelerators:
            fit = min(fit, self._accelerators // one.accelerators)
        return fit

    def take(self, one: Priced, replicas: int) -> None:
        assert self.fitting(one, replicas) == replicas, "asked before taken"
        if self._money is not None and one.price_per_hour:
            self._money -= one.price_per_hour * replicas
        if self._accelerators is not None:
            self._accelerators -= one.accelerators * replicas

    def hold(self, one: Priced, replicas: int) -> None:
        """Count what exists already, whether it fits or not."""
        if self._money is not None and one.price_per_hour:
            self._money = max(Decimal(0), self._money - one.price_per_hour * replicas)
        if self._accelerators is not None:
            self._accelerators = max(0, self._accelerators - one.accelerators * replicas)

    def limits(self, one: Priced) -> bool:
        """Whether any cap is about this service."""
        money = self._money is not None and bool(one.price_per_hour)
        return money or (self._accelerators is not None and one.accelerators > 0)

    def share(self, one: Priced, replicas: int) -> float:
        """The largest share that `replicas` are of a cap; 0 where they touch none."""
        money, accelerators = self._whole.per_hour, self._whole.accelerators
        shares = [0.0]
        if money is not None and one.price_per_hour:
            shares.append(float(one.price_per_hour * replicas / money) if money else math.inf)
        if accelerators is not None and one.accelerators:
            shares.append(one.accelerators * replicas / accelerators if accelerators else math.inf)
        return max(shares)


def _grant_floors(ordered: Sequence[Claim], ledger: Ledger) -> dict[str, _Held]:
    held = {}
    for one in ordered:
        steps = hull(one)
        fit = ledger.fitting(one, steps[0].replicas)
        ledger.take(one, fit)
        held[one.service] = _Held(steps[0], steps[1:], fit, steps[0].replicas - fit)
    return held


def _climb(ordered: Sequence[Claim], held: Mapping[str, _Held], ledger: Ledger) -> dict[str, str]:
    """Take the best step that fits until none does, band by band; what was refused, by service.

    A service whose next step does not fit climbs no further: the steps above it are larger for less.
    """
    refused: dict[str, str] = {}
    if any(one.missing for one in held.values()):
        return refused
    ledger.measure()
    by_name = {one.service: one for one in ordered}
    for band in sorted({one.priority for one in ordered}, reverse=True):
        names = [one.service for one in ordered if one.priority == band]
        best = [entry for name in names if (entry := _entry(by_name[name], held[name], ledger)) is not None]
        heapq.heapify(best)
        while best:
            _, name = heapq.heappop(best)
            claim, at = by_name[name], held[name]
            upper = at.above[0]
            more = upper.replicas - at.replicas
            if ledger.fitting(claim, more) < more:
                refused[name] = f"{upper.replicas} replicas: {more} more do not fit the fleet's caps"
                continue
            ledger.take(claim, more)
            at.rise(upper)
            if (entry := _entry(claim, at, ledger)) is not None:
                heapq.heappush(best, entry)
        _fill([by_name[name] for name in names if name in refused], held, ledger)
    return refused


def _fill(stopped: Sequence[Claim], held: Mapping[str, _Held], ledger: Ledger) -> None:
    """Give what is left to services that a step did not fit: any choice worth more that does."""
    gains = [
        (held[one.service].choice.value - choice.value, one.service, choice.replicas, one, choice)
        for one in stopped
        for choice in one.choices
        if choice.value > held[one.service].choice.value and choice.replicas > held[one.service].replicas
    ]
    for _, name, _, one, choice in sorted(gains, key=lambda gain: gain[:3]):
        more = choice.replicas - held[name].replicas
        if more > 0 and choice.value > held[name].choice.value and ledger.fitting(one, more) == more:
            ledger.take(one, more)
            held[name].rise(choice)


def _with_spare(ordered: Sequence[Claim], grants: Mapping[str, Grant], ledger: Ledger) -> dict[str, Grant]:
    """Share out what is left, a replica each in turn; who touches no cap may have all that its spec allows."""
    spare = dict.fromkeys(grants, 0)
    turns: list[tuple[int, int, Claim]] = []
    for place, one in enumerate(ordered):
        room = max(0, one.most - grants[one.service].replicas)
        if not ledger.limits(one):
            spare[one.service] = room
        elif room:
            turns.append((0, place, one))
    while turns:
        count, place, one = heapq.heappop(turns)
        if ledger.fitting(one, 1) < 1:
            continue
        ledger.take(one, 1)
        spare[one.service] = count + 1
        if grants[one.service].replicas + count + 1 < one.most:
            heapq.heappush(turns, (count + 1, place, one))
    return {name: replace(grant, spare=spare[name]) for name, grant in grants.items()}


def _entry(claim: Claim, at: _Held, ledger: Ledger) -> tuple[float, str] | None:
    """The next step's value for its share of the caps, best first; ties by name, whatever the order of claims."""
    if not at.above:
        return None
    upper = at.above[0]
    share, gained = ledger.share(claim, upper.replicas - at.replicas), upper.value - at.choice.value
    return (-gained / share if share > 0 else -math.inf), claim.service


def _kept(ordered: Sequence[Claim], caps: Caps, before: FleetPlan | None, value: float) -> FleetPlan | None:
    """The grants of before, if they fit, hold every floor of now, and little would be gained by others."""
    if before is None or set(before.grants) != {one.service for one in ordered}:
        return None
    ledger, total, points = Ledger(caps), 0.0, {}
    for one in ordered:
        granted = before.grants[one.service].replicas
        affordable = [choice for choice in one.choices if choice.replicas <= granted]
        if not affordable or ledger.fitting(one, granted) < granted:
            return None
        ledger.take(one, granted)
        best = max(affordable, key=lambda choice: choice.value)
        total += best.value
        points[one.service] = best.points
    if value > total * (1 + WORTH_A_CHANGE):
        return None
    text = f"other grants would be worth {100 * (value / total - 1) if total else 0:.1f} % more"
    grants = {
        name: replace(grant, points=points[name], status=Status.HOLD, reason=Reason.DWELL, message=text)
        for name, grant in before.grants.items()
    }
    grants = _with_spare(ordered, grants, ledger)
    return FleetPlan(Status.HOLD, Reason.DWELL, f"grants are kept: {text}", grants, total)


def _grant(claim: Claim, held: _Held, refused: str | None) -> Grant:
    choice = held.choice
    if held.missing:
        text = f"{held.replicas} of the {choice.replicas} replicas that hold the load at the floors"
        return Grant(claim.service, held.replicas, choice.points, Status.BLOCKED, Reason.FLEET_QUOTA, text)
    text = f"{held.replicas} replicas, worth {choice.value:.2f}"
    if held.above:
        upper = refused or f"{held.above[0].replicas} replicas: the caps do not hold all floors"
        return Grant(claim.service, held.replicas, choice.points, Status.BLOCKED, Reason.FLEET_QUOTA, text, upper)
    return Grant(claim.service, held.replicas, choice.points, Status.HOLD, Reason.STEADY, text)


def _plan(grants: Mapping[str, Grant], value: float, unserved: tuple[str, ...], caps: Caps) -> FleetPlan:
    if unserved:
        text = f"caps do not hold the floors of {', '.join(unserved[:5])}; they shed, lowest priority first"
        return FleetPlan(Status.BLOCKED, Reason.FLEET_QUOTA, text, grants, value, unserved)
    cut = sum(grant.status is Status.BLOCKED for grant in grants.values())
    if cut:
        text = f"{cut} of {len(grants)} services run below their tops: more does not fit {_named(caps)}"
        return FleetPlan(Status.PROGRESS, Reason.FLEET_QUOTA, text, grants, value)
    return FleetPlan(
        Status.PROGRESS, Reason.STEADY, f"all {len(grants)} services have what they ask for", grants, value
    )


def _named(caps: Caps) -> str:
    named = {"an hour": caps.per_hour, "accelerators": caps.accelerators}
    return " and ".join(f"{cap} {unit}" for unit, cap in named.items() if cap is not None)
