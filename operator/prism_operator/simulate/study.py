"""Several policies on one workload and in one world, over several seeds: what the command and the evidence run."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prism_api.profile import Profile
from prism_operator.plan.types import ServicePolicy
from prism_operator.simulate.fleet import Fleet, Sample
from prism_operator.simulate.policies import Setting, build, lengths_of, starts_at_fixed
from prism_operator.simulate.score import Score, score
from prism_operator.simulate.workload import SimRequest
from prism_operator.simulate.world import StartTime, World, lognormal_start

TAIL_S = 300.0
"""Played after the last arrival, so that requests end and pools begin to shrink."""


@dataclass(frozen=True, slots=True)
class Study:
    """A service, its pods, and a workload by seed. `initial`: replicas ready at the start."""

    policy: ServicePolicy
    profile: Profile
    workload: Callable[[int], Sequence[SimRequest]]
    start_median_s: float
    start_p90_s: float
    initial: int
    world: World = field(default_factory=World)

    def starts(self, seed: int) -> StartTime:
        if self.start_p90_s <= self.start_median_s:
            return lambda n: self.start_median_s
        return lognormal_start(seed, self.start_median_s, self.start_p90_s)


@dataclass(slots=True)
class Results:
    """Scores by policy, in order of seeds, and the samples of the first seed for plots."""

    scores: dict[str, list[Score]] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def run(study: Study, names: Iterable[str], seeds: Sequence[int]) -> Results:
    """Every policy on every seed. Prism runs first: its mean is what policies with fixed replicas get, rounded."""
    results = Results()
    order = ["prism", *(name for name in names if name != "prism")]
    for seed in seeds:
        requests = study.workload(seed)
        fixed = study.initial
        for name in order:
            setting = Setting(study.policy, study.profile, lengths_of(requests), fixed)
            fleet = play(study, setting, name, seed, requests)
            taken = score(fleet, name, seed)
            results.scores.setdefault(name, []).append(taken)
            results.samples.setdefault(name, fleet.samples)
            if name == "prism":
                fixed = max(study.policy.min_replicas, round(taken.mean_replicas))
    return results


def play(study: Study, setting: Setting, name: str, seed: int, requests: Sequence[SimRequest]) -> Fleet:
    """One run of the policy `name`."""
    fleet = fleet_of(study, setting, name, seed)
    fleet.run(copied(requests), requests[-1].arrived_s + TAIL_S)
    return fleet


def fleet_of(study: Study, setting: Setting, name: str, seed: int) -> Fleet:
    """The pool before its first second."""
    return Fleet(
        study.policy,
        study.profile,
        pods=setting.fixed if starts_at_fixed(name) else study.initial,
        start_s=study.starts(seed),
        controller=build(name, setting),
        world=replace(study.world, seed=seed),
    )


def copied(requests: Sequence[SimRequest]) -> list[SimRequest]:
    """For a run to write into."""
    return [SimRequest(r.arrived_s, r.service_class, r.prompt_tokens, r.output_tokens) for r in requests]


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t by number of runs; more than ten take the value of ten."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the half-open ends of its 95 % interval; all the same for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = T_95[min(len(values), max(T_95))] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def dominating(scores: Mapping[str, Sequence[Score]]) -> list[str]:
    """Policies that are no worse than prism in mean attainment and mean replica-hours, and better in one."""

    def means(name: str) -> tuple[float, float]:
        runs = scores[name]
        return statistics.fmean(s.attainment for s in runs), statistics.fmean(s.replica_hours for s in runs)

    attainment, hours = means("prism")
    found = []
    for name in scores:
        theirs, cost = means(name)
        if name != "prism" and theirs >= attainment and cost <= hours and (theirs, cost) != (attainment, hours):
            found.append(name)
    return found
