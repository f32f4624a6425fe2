"""How hard a service is pressed: measured saturation per class, and whether offered load fits ready capacity.

`Pressure` is the one picture that the fast decision looks at; every method is a question and changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_low

from prism_api import FULL
from prism_api.profile import Profile
from prism_operator.plan import capacity, demand
from prism_operator.plan.capacity import ClassLoad
from prism_operator.plan.types import BudgetState, ClassPolicy, DemandState, Observation, ServicePolicy

Points = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pressure:
    """Load and capacity at one tick.

    acknowledged  ready pods that said at which point they run; they follow the next directive within milliseconds
    silent        other ready pods: counted at `full`, whatever they may run (fail closed)
    rates         what each class presses with, in requests a second; None while unknown. See `plan.demand`
    loads         the same with lengths; None if any class with traffic has unknown lengths
    backlog       waiting requests beyond the one per pod that only waits for the current step to end, if every pod had
                  as many as the median one: what waits at a few pods is a matter of their governors, not of the pool
    settled_s     how long the newest pod has been ready
    joining       that is a short time, and others were there before: it gets every request until it is as full as they
                  are, and what is slow there meanwhile says nothing about the pool
    """

    acknowledged: int
    silent: int
    ordered: int
    rates: Mapping[str, float | None]
    loads: tuple[ClassLoad, ...] | None
    backlog: int
    settled_s: float
    joining: bool
    profile: Profile | None
    saturation: Mapping[str, float | None]
    _needs: dict[tuple[tuple[str, str], ...], float | None] = field(default_factory=dict, compare=False, repr=False)
    """Answers of `need`: a tick asks about the same points several times, and each answer is dear."""

    @property
    def ready(self) -> int:
        return self.acknowledged + self.silent

    def fits(
        self, points: Points, margin: float, *, ordered: bool = False, without: frozenset[str] = frozenset()
    ) -> bool | None:
        """Whether offered load plus `margin` fits the ready pods (or all ordered ones) at `points`; None if unknown.

        `without` leaves classes out: those to be shed.
        """
        if self.loads is None or self.profile is None:
            return None
        need = self.need(points, without)
        need_full = self.need(dict.fromkeys(points, FULL), without) if self.silent else None
        if need is None or (self.silent and need_full is None):
            return None
        if need == 0:
            return True
        need *= 1 + margin
        silent = self.silent / (need_full * (1 + margin)) if need_full else 0.0
        steered = (max(self.ordered, self.ready) - self.silent) if ordered else self.acknowledged
        return steered / need + silent >= 1

    def need(self, points: Points, without: frozenset[str] = frozenset()) -> float | None:
        """Replicas that hold the offered load at `points`, as a real number; None if unknown."""
        if self.loads is None or self.profile is None:
            return None
        if without:
            loads = [load for load in self.loads if load.policy.name not in without]
            return capacity.replicas_for(loads, points, self.profile)
        key = tuple(points.items())
        if key not in self._needs:
            self._needs[key] = capacity.replicas_for(self.loads, points, self.profile)
        return self._needs[key]

    def predicted(self, name: str, current: Points, candidate: Points, budgets: Mapping[str, int]) -> float | None:
        """Saturation of a class if the points changed: measured, times the predicted ratio of step times.

        Without a profile the step time is taken as proportional to the budget, the most it can be. None without
        samples.
        """
        measured = self.saturation[name]
        if measured is None:
            return None
        if self.loads is not None and self.profile is not None:
            before = capacity.time_per_token_s(self.loads, current, self.profile, self.ready)
            after = capacity.time_per_token_s(self.loads, candidate, self.profile, self.ready)
            if before is not None and after is not None and math.isfinite(before):
                return measured * after / before
        return measured * budgets[candidate[name]] / budgets[current[name]]


def measure(observation: Observation, state: DemandState, policy: ServicePolicy, memory: BudgetState) -> Pressure:
    """Look at one tick. Saturation counts only what came after the class last moved: no cause is acted on twice."""
    names = [class_policy.name for class_policy in policy.classes]
    acknowledged = sum(all(name in pod.points for name in names) for pod in observation.fresh)
    ready = len(observation.ready)
    waiting = [max(0, pod.load.waiting - 1) for pod in observation.fresh if pod.load is not None]
    backlog = len(waiting) * median_low(waiting) if waiting else 0
    rates: dict[str, float | None] = {}
    for name in names:
        rate = demand.pressing_rate(state, name, policy)
        rates[name] = None if rate is None else rate.per_s
    return Pressure(
        acknowledged=acknowledged,
        silent=ready - acknowledged,
        ordered=ready + observation.missing,
        rates=rates,
        loads=_loads(policy, state, rates, backlog),
        backlog=backlog,
        settled_s=observation.settled_s,
        joining=observation.settled_s <= policy.loop.long_window_s < observation.oldest_s,
        profile=None if observation.profile is None else capacity.scaled(observation.profile, state.cost_factor),
        saturation={
            class_policy.name: _saturation(class_policy, observation.now_s, state, policy, memory)
            for class_policy in policy.classes
        },
    )


def _loads(
    policy: ServicePolicy, state: DemandState, rates: Mapping[str, float | None], backlog: int
) -> tuple[ClassLoad, ...] | None:
    """Known rates, each with its share of the backlog, which must drain within the TTFT objective."""
    known = {name: rate for name, rate in rates.items() if rate is not None}
    total = sum(known.values())
    loads = []
    for class_policy in policy.classes:
        rate = known.get(class_policy.name)
        if not rate:
            continue
        lengths = demand.mean_lengths(state, class_policy.name)
        if lengths is None:
            return None
        drain_s = class_policy.ttft_s or policy.loop.short_window_s
        loads.append(ClassLoad(class_policy, rate + backlog * (rate / total) / drain_s, lengths))
    return tuple(loads)


def _saturation(
    class_policy: ClassPolicy, now_s: float, state: DemandState, policy: ServicePolicy, memory: BudgetState
) -> float | None:
    """Worst quantile over its objective, at most the clamp; None without samples since the last move."""
    remembered = memory.classes.get(class_policy.name)
    since_move_s = math.inf if remembered is None else now_s - remembered.moved_s - policy.loop.fast_period_s
    seconds = min(policy.loop.short_window_s, since_move_s)
    if seconds <= 0:
        return None
    seen = demand.window(state, class_policy.name, seconds)
    saturation = demand.saturation(seen, class_policy)
    return None if saturation is None else min(policy.loop.clamp, saturation)
