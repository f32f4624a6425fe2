"""Figures of the planner: simulated ramps and traces, and the cost of a tick. Writes evidence/planner.json.

    python -m evidence.planner                 everything that needs no cluster (half an hour of one core)
    python -m evidence.planner --only ID...    these, keeping the others
    python -m evidence.planner --table         the Pareto table alone, every cell, into evidence/planner_pareto.json

Simulated figures are as good as the profiles, which are estimates (see their provenance); seeds stand beside them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from evidence.figures import Figure, NotTaken, absent, measured, merge
from prism_operator.plan.policy import resolve
from prism_operator.plan.types import LoopSettings, ServicePolicy
from prism_operator.simulate import ramp, report
from prism_operator.simulate.baselines.keda_slo import KedaSlo
from prism_operator.simulate.control import Controller, Prism
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.policies import BASELINES
from prism_operator.simulate.score import Score, score
from prism_operator.simulate.study import Results, Study, dominating, interval, run
from prism_operator.simulate.traces import Reading, read
from prism_operator.simulate.workload import SimRequest, poisson
from prism_operator.simulate.world import World

OUT = Path(__file__).with_name("planner.json")
CELLS = Path(__file__).with_name("planner_pareto.json")
TRACES = Path(__file__).parents[1] / "examples" / "traces"
COMMAND = "python -m evidence.planner"
RAMP_SEEDS, PARETO_SEEDS = tuple(range(10)), tuple(range(5))
SPEED_UPS = (1.2, 1.5, 2.0)
TRACE_SPEED_UP = 1.5
"""H of the knob on the traces."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A piece of a trace, and the service that it is played against."""

    name: str
    profile: str
    ttft_ms: int
    tpot_ms: int
    least: int
    most: int
    reading: Reading
    start_median_s: float = 100.0
    start_p90_s: float = 130.0


EPISODES = (
    Episode("azure2023_code", "l4-olmoe", 2000, 150, 2, 12, Reading("default", factor=2, longest_prompt=3500), 60, 80),
    Episode("azure2023_conv", "l4-olmoe", 2000, 150, 2, 12, Reading("default", factor=3, longest_prompt=3500), 60, 80),
    Episode("mooncake_synthetic", "h100x2-qwen3-32b", 10000, 150, 2, 16, Reading("default")),
    Episode(
        "servegen_m-small",
        "l4-olmoe",
        1000,
        150,
        1,
        12,
        Reading("default", start_s=54000, span_s=14400, factor=0.05),
        60,
        80,
    ),
    Episode(
        "servegen_m-mid",
        "l4-olmoe",
        1000,
        150,
        1,
        12,
        Reading("default", start_s=0, span_s=14400, factor=0.015),
        60,
        80,
    ),
)


def ramp_policy() -> ServicePolicy:
    resolved = resolve(ramp.service(), ramp.model(), LoopSettings())
    assert isinstance(resolved, ServicePolicy), str(resolved)
    return resolved


@cache
def ramp_run(speed_up: float, law: bool, seed: int) -> Score:
    """One episode of llm-d's ramp, under its law or under Prism with a knob of `speed_up`."""
    policy = ramp_policy()
    controller: Controller = Prism(policy)
    if law:
        controller = KedaSlo(ramp.TTFT_MS / 1000, ramp.TPOT_MS / 1000, ramp.LEAST, ramp.MOST)
    profile = ramp.knob(ramp.shipped_profile(ramp.PROFILE), speed_up)
    fleet = Fleet(policy, profile, ramp.LEAST, lambda n: ramp.START_S, controller, World(seed=seed))
    ramp.play(fleet, seed)
    return score(fleet, controller.name, seed)


def study_of(episode: Episode) -> Study:
    classes = [
        {
            "name": "default",
            "objectives": {"ttftMilliseconds": episode.ttft_ms, "tpotMilliseconds": episode.tpot_ms},
            "quality": {"minRelativeQuality": "0.95"},
        }
    ]
    scaling = {"minReplicas": episode.least, "maxReplicas": episode.most}
    spec = ramp.service(classes=classes, scaling=scaling)
    policy = resolve(spec, ramp.model(), LoopSettings(pod_ready_s=episode.start_median_s))
    assert isinstance(policy, ServicePolicy), str(policy)

    def workload(seed: int) -> list[SimRequest]:
        return read(TRACES / f"{episode.name}.csv", replace(episode.reading, seed=seed))

    return Study(
        policy=policy,
        profile=ramp.knob(ramp.shipped_profile(episode.profile), TRACE_SPEED_UP),
        workload=workload,
        start_median_s=episode.start_median_s,
        start_p90_s=episode.start_p90_s,
        initial=episode.least,
    )


@cache
def pareto(name: str) -> Results:
    """Every policy on one episode, all seeds."""
    episode = next(one for one in EPISODES if one.name == name)
    return run(study_of(episode), BASELINES, PARETO_SEEDS)


def _law(value: Callable[[Score], float]) -> Callable[[], Sequence[float | None]]:
    return lambda: [value(ramp_run(SPEED_UPS[0], True, seed)) for seed in RAMP_SEEDS]


def _prism(
    value: Callable[[Score], float | None], speed_up: float = SPEED_UPS[0]
) -> Callable[[], Sequence[float | None]]:
    return lambda: [value(ramp_run(speed_up, False, seed)) for seed in RAMP_SEEDS]


def dominated_cells() -> list[str]:
    """(trace, baseline) pairs in which the baseline is no worse than prism in both, and better in one."""
    return [f"{one.name}/{name}" for one in EPISODES for name in dominating(pareto(one.name).scores)]


def floor_violations() -> int:
    ramps = [ramp_run(h, False, seed) for h in SPEED_UPS for seed in RAMP_SEEDS]
    traces = [taken for one in EPISODES for taken in pareto(one.name).scores["prism"]]
    return sum(taken.floor_violations for taken in (*ramps, *traces))


def times_real_time() -> list[float]:
    """Simulated seconds per CPU second: 100 pods under Prism at llm-d's token lengths, 100 requests/s, ten minutes."""
    taken = []
    for seed in range(3):
        spec = ramp.service(scaling={"minReplicas": 100, "maxReplicas": 100})
        policy = resolve(spec, ramp.model(), LoopSettings())
        assert isinstance(policy, ServicePolicy), str(policy)
        profile = ramp.knob(ramp.shipped_profile(ramp.PROFILE), TRACE_SPEED_UP)
        requests = poisson(seed, [(600.0, 100.0)], prompt=4000, output=1000, name="default")
        fleet = Fleet(policy, profile, 100, world=World(seed=seed))
        began_s = time.process_time()
        fleet.run(requests, 600.0)
        taken.append(600.0 / (time.process_time() - began_s))
    return taken


def _no_cluster() -> Sequence[float | None]:
    raise NotTaken("not taken: needs the local cluster under a burst slice, beside this simulation of it")


def _tick() -> Sequence[float | None]:
    raise NotTaken("not taken: the bench of a tick over 1,000 services is not written yet")


@dataclass(frozen=True, slots=True)
class Collector:
    unit: str
    how: str
    take: Callable[[], Sequence[float | None]]
    seeds: Sequence[int] = ()


RAMP_HOW = f"{COMMAND}: llm-d's published ramp, simulated, profile {ramp.PROFILE} (an estimate)"
COLLECTORS = {
    "llmd.law.attainment": Collector("share", RAMP_HOW, _law(lambda s: s.attainment), RAMP_SEEDS),
    "llmd.law.replicas": Collector("replicas", RAMP_HOW, _law(lambda s: s.mean_replicas), RAMP_SEEDS),
    "llmd.prism.attainment": Collector("share", f"{RAMP_HOW}, H = 1.2", _prism(lambda s: s.attainment), RAMP_SEEDS),
    "llmd.prism.replicas": Collector("replicas", f"{RAMP_HOW}, H = 1.2", _prism(lambda s: s.mean_replicas), RAMP_SEEDS),
    "llmd.prism.relative_quality": Collector(
        "share", f"{RAMP_HOW}, H = 1.2", _prism(lambda s: s.relative_quality), RAMP_SEEDS
    ),
}
for _speed_up in SPEED_UPS[1:]:
    for _name, _unit, _value in (
        ("attainment", "share", lambda s: s.attainment),
        ("replicas", "replicas", lambda s: s.mean_replicas),
        ("relative_quality", "share", lambda s: s.relative_quality),
    ):
        COLLECTORS[f"llmd.prism.h{_speed_up:g}.{_name}"] = Collector(
            _unit, f"{RAMP_HOW}, H = {_speed_up:g}", _prism(_value, _speed_up), RAMP_SEEDS
        )
PARETO_HOW = f"{COMMAND}: {len(EPISODES)} traces, {len(BASELINES)} baselines; every cell in {CELLS.name}"
COLLECTORS |= {
    "pareto.cells": Collector("cells", PARETO_HOW, lambda: [float(len(EPISODES) * len(BASELINES))], PARETO_SEEDS),
    "pareto.dominated_cells": Collector("cells", PARETO_HOW, lambda: [float(len(dominated_cells()))], PARETO_SEEDS),
    "quality.floor_violations": Collector(
        "requests", f"{COMMAND}: all ramps and traces under Prism", lambda: [float(floor_violations())], PARETO_SEEDS
    ),
    "tick.seconds_per_1000_services": Collector("s", COMMAND, _tick),
    "sim.times_real_time": Collector(
        "simulated s per CPU s", f"{COMMAND}: 100 pods, one core", times_real_time, range(3)
    ),
    "sim.minus_cluster_attainment_points": Collector("points", COMMAND, _no_cluster),
}


def write_cells() -> None:
    """Every cell of the Pareto table, the unfavourable ones too."""
    rows = []
    for episode in EPISODES:
        scores = pareto(episode.name).scores
        better = dominating(scores)
        for name, runs in scores.items():
            rows.append(
                {
                    "trace": episode.name,
                    "policy": name,
                    "dominates_prism": name in better,
                    "attainment": [round(value, 5) for value in interval([one.attainment for one in runs])],
                    "replica_hours": [round(value, 4) for value in interval([one.replica_hours for one in runs])],
                    "relative_quality": round(statistics.fmean(one.relative_quality or 0.0 for one in runs), 5),
                    "effective_accuracy": round(statistics.fmean(one.effective_accuracy for one in runs), 5),
                    "floor_violations": sum(one.floor_violations for one in runs),
                }
            )
    CELLS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def collect(name: str) -> Figure:
    collector = COLLECTORS[name]
    try:
        return measured(name, collector.take(), collector.unit, collector.how, list(collector.seeds))
    except NotTaken as error:
        return absent(name, collector.unit, collector.how, str(error))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.planner", description="Re-take the planner's figures.")
    ids = ", ".join(COLLECTORS)
    parser.add_argument("--only", nargs="+", choices=COLLECTORS, metavar="ID", help=f"re-take these alone: {ids}")
    parser.add_argument("--table", action="store_true", help="print the table of every trace, and write its cells")
    arguments = parser.parse_args()
    for name in () if arguments.table else (name for name in COLLECTORS if name in (arguments.only or COLLECTORS)):
        figure = collect(name)
        merge(OUT, figure, tuple(COLLECTORS))  # at once, so that an interruption loses nothing
        print(f"{name}: {figure.value if figure.why is None else figure.why}", file=sys.stderr, flush=True)
    if arguments.table or not arguments.only:
        for episode in EPISODES:
            print(f"\n{episode.name}\n{report.table(pareto(episode.name))}", flush=True)
        write_cells()
    return 0


if __name__ == "__main__":
    sys.exit(main())
