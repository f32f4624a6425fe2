"""Figures of the planner: simulated ramps and traces, and the cost of a tick. Writes evidence/planner.json.

    python -m evidence.planner                 everything that needs no cluster (two hours of one core)
    python -m evidence.planner --only ID...    these, keeping the others
    python -m evidence.planner --table         the Pareto table alone, every cell, into evidence/planner_pareto.json

Simulated figures are as good as the profiles, which are estimates (see their provenance); seeds stand beside them.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from evidence import figures
from evidence import planner_page as page
from evidence.figures import NotTaken, load
from prism_operator import plan_bench
from prism_operator.plan.policy import resolve
from prism_operator.plan.types import LoopSettings, ServicePolicy
from prism_operator.simulate import ramp, report
from prism_operator.simulate.baselines.keda_slo import KedaSlo
from prism_operator.simulate.control import Controller, Prism
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.policies import BASELINES
from prism_operator.simulate.score import Score, score
from prism_operator.simulate.study import Study, dominating, interval, run
from prism_operator.simulate.traces import Reading, read
from prism_operator.simulate.workload import SimRequest, poisson
from prism_operator.simulate.world import World

OUT = Path(__file__).with_name("planner.json")
CELLS = Path(__file__).with_name("planner_pareto.json")
TRACES = Path(__file__).parents[1] / "examples" / "traces"
COMMAND = "python -m evidence.planner"
NEVER_TAKEN = "not taken yet; run: make evidence-planner"
RAMP_SEEDS, PARETO_SEEDS, TICK_SEEDS = tuple(range(10)), tuple(range(5)), (42,)
OTHER_SEEDS = tuple(range(5, 15))
"""On which nothing was chosen."""
SPEED_UPS = (1.2, 1.5, 2.0)
FIXED_HEADROOM = "0.10"
"""What `scaling.headroom` is at least where it is not set, alone: to tell what is gained by learning more."""
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
    initial: int
    reading: Reading
    start_median_s: float = 100.0
    start_p90_s: float = 130.0


EPISODES = (
    Episode(
        "azure2023_code", "l4-olmoe", 2000, 150, 2, 12, 4, Reading("default", factor=2, longest_prompt=3500), 60, 80
    ),
    Episode("azure2023_conv", "l4-olmoe", 2000, 150, 2, 12, 5, Reading("default", longest_prompt=3500), 60, 80),
    Episode("mooncake_synthetic", "h100x2-qwen3-32b", 10000, 300, 2, 12, 5, Reading("default")),
    Episode(
        "servegen_m-small",
        "l4-olmoe",
        1000,
        150,
        1,
        12,
        2,
        Reading("default", factor=0.03),
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
        3,
        Reading("default", factor=0.01, longest_prompt=3500),
        60,
        80,
    ),
)
"""Each rate is thinned or doubled so that a handful of replicas holds the mean; `initial` replicas are ready."""


def ramp_policy(headroom: str | None = None) -> ServicePolicy:
    """Of the benchmark's service; everything is the default unless a headroom is set."""
    scaling = {"minReplicas": ramp.LEAST, "maxReplicas": ramp.MOST, "headroom": headroom}
    resolved = resolve(ramp.service(scaling=scaling), ramp.model(), LoopSettings())
    assert isinstance(resolved, ServicePolicy), str(resolved)
    return resolved


@cache
def ramp_run(speed_up: float, law: bool, seed: int, headroom: str | None = None, governors: bool = False) -> Score:
    """One episode of llm-d's ramp, under its law or under Prism with a knob of `speed_up`."""
    policy = ramp_policy(headroom)
    controller: Controller = Prism(policy)
    if law:
        controller = KedaSlo(ramp.TTFT_MS / 1000, ramp.TPOT_MS / 1000, ramp.LEAST, ramp.MOST)
    return ramp_episode(policy, controller, speed_up, World(seed=seed, governors=governors))


def ramp_episode(policy: ServicePolicy, controller: Controller, speed_up: float, world: World) -> Score:
    profile = ramp.knob(ramp.shipped_profile(ramp.PROFILE), speed_up)
    fleet = Fleet(policy, profile, ramp.LEAST, lambda n: ramp.START_S, controller, world)
    ramp.play(fleet, world.seed)
    return score(fleet, controller.name, world.seed)


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
        initial=episode.initial,
    )


Row = dict[str, Any]


def cells_of(episode: Episode, most_s: float) -> list[Row]:
    """Every policy on one episode over all seeds: one row of the Pareto table each, the unfavourable ones too."""
    reading = replace(episode.reading, span_s=min(episode.reading.span_s, most_s))
    results = run(study_of(replace(episode, reading=reading)), BASELINES, PARETO_SEEDS)
    print(f"\n{episode.name}\n{report.table(results)}", flush=True)
    better = dominating(results.scores)
    return [
        {
            "trace": episode.name,
            "policy": name,
            "dominates_prism": name in better,
            "attainment": [round(value, 5) for value in interval([one.attainment for one in runs])],
            "replica_hours": [round(value, 4) for value in interval([one.replica_hours for one in runs])],
            "mean_replicas": round(statistics.fmean(one.mean_replicas for one in runs), 3),
            "relative_quality": round(statistics.fmean(one.relative_quality or 0.0 for one in runs), 5),
            "effective_accuracy": round(statistics.fmean(one.effective_accuracy for one in runs), 5),
            "floor_violations": sum(one.floor_violations for one in runs),
            "point_flaps": sum(one.point_flaps for one in runs),
            "replica_flaps": sum(one.replica_flaps for one in runs),
            "seconds": round(statistics.fmean(one.seconds for one in runs)),
            "seeds": list(PARETO_SEEDS),
        }
        for name, runs in results.scores.items()
    ]


def take_cells(names: Sequence[str], most_s: float) -> None:
    """Play these episodes and put their rows into the file, each at once, so that an interruption loses little."""
    for episode in (one for one in EPISODES if one.name in names):
        taken = {episode.name: cells_of(episode, most_s)}
        known: list[Row] = json.loads(CELLS.read_text()) if CELLS.exists() else []
        for row in known:
            if row["trace"] != episode.name:
                taken.setdefault(row["trace"], []).append(row)
        rows = [row for one in EPISODES for row in taken.get(one.name, ())]
        CELLS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def cells() -> list[Row]:
    """The rows of all episodes. Raises NotTaken if one is missing."""
    rows: list[Row] = json.loads(CELLS.read_text()) if CELLS.exists() else []
    missing = {one.name for one in EPISODES} - {row["trace"] for row in rows}
    if missing:
        raise NotTaken(f"not taken: no cells for {', '.join(sorted(missing))}; run: {COMMAND} --table")
    return rows


@cache
def other_seeds() -> list[tuple[Score, Score]]:
    """Prism and its budget alone, which comes nearest to it, on the trace of bursts by other seeds than the table's."""
    scores = run(study_of(EPISODES[0]), ("budget-only",), OTHER_SEEDS).scores
    return list(zip(scores["prism"], scores["budget-only"], strict=True))


def floor_violations() -> int:
    """Of Prism, on all ramps and traces."""
    traces = sum(row["floor_violations"] for row in cells() if row["policy"] == "prism")
    ramps = [ramp_run(h, False, seed) for h in SPEED_UPS for seed in RAMP_SEEDS]
    return traces + sum(taken.floor_violations for taken in ramps)


def _law(value: Callable[[Score], float]) -> Callable[[], Sequence[float | None]]:
    return lambda: [value(ramp_run(SPEED_UPS[0], True, seed)) for seed in RAMP_SEEDS]


def _prism(
    value: Callable[[Score], float | None], speed_up: float, headroom: str | None, governors: bool
) -> Callable[[], Sequence[float | None]]:
    return lambda: [value(ramp_run(speed_up, False, seed, headroom, governors)) for seed in RAMP_SEEDS]


def times_real_time() -> list[float]:
    """Simulated seconds per CPU second: 100 pods under Prism at llm-d's token lengths, 100 requests/s, five minutes."""
    taken = []
    for seed in range(3):
        spec = ramp.service(scaling={"minReplicas": 100, "maxReplicas": 100})
        policy = resolve(spec, ramp.model(), LoopSettings())
        assert isinstance(policy, ServicePolicy), str(policy)
        profile = ramp.knob(ramp.shipped_profile(ramp.PROFILE), TRACE_SPEED_UP)
        requests = poisson(seed, [(300.0, 100.0)], prompt=4000, output=1000, name="default")
        fleet = Fleet(policy, profile, 100, world=World(seed=seed))
        began_s = time.process_time()
        fleet.run(requests, 300.0)
        taken.append(300.0 / (time.process_time() - began_s))
    return taken


CLUSTER_COMMAND = "python -m evidence.planner_cluster"
CLUSTER = ("sim.minus_cluster_attainment_points", "sim.minus_cluster_attainment_points.held")
ENGINE_COMMAND = "python -m evidence.planner_engine"
ENGINE = tuple(f"sim.over_engine.{latency}_{share}" for latency in ("ttft", "tpot") for share in ("p50", "p95"))
BESIDE = dict.fromkeys(CLUSTER, ("points", CLUSTER_COMMAND)) | dict.fromkeys(ENGINE, ("times", ENGINE_COMMAND))
"""Unit and command of the figures that compare the simulator with the system on a quiet machine; kept as they were."""


def _elsewhere(command: str) -> Callable[[], Sequence[float | None]]:
    def refuse() -> Sequence[float | None]:
        raise NotTaken(f"not taken yet; needs a quiet machine, run: {command}")

    return refuse


def _tick() -> list[float]:
    return [plan_bench.measure(services=1000, pods=10, classes=3, seed=seed).total_s for seed in TICK_SEEDS]


def _figure(
    unit: str, how: str, take: Callable[[], Sequence[float | None]], seeds: Sequence[int] = ()
) -> figures.Collector[None]:
    """Simulations need no subject but themselves."""
    return figures.Collector(unit, how, lambda _: take(), seeds)


RAMP_HOW = f"{COMMAND}: llm-d's published ramp, simulated, profile {ramp.PROFILE} (an estimate)"
MEASURES: tuple[tuple[str, str, Callable[[Score], float | None]], ...] = (
    ("attainment", "share", lambda one: one.attainment),
    ("replicas", "replicas", lambda one: one.mean_replicas),
    ("relative_quality", "share", lambda one: one.relative_quality),
)
COLLECTORS = {
    "llmd.law.attainment": _figure("share", RAMP_HOW, _law(lambda one: one.attainment), RAMP_SEEDS),
    "llmd.law.replicas": _figure("replicas", RAMP_HOW, _law(lambda one: one.mean_replicas), RAMP_SEEDS),
}
for _prefix, _speed_up, _headroom, _governors in (
    ("llmd.prism", SPEED_UPS[0], None, False),
    *((f"llmd.prism.h{_h:g}", _h, None, False) for _h in SPEED_UPS[1:]),
    *((f"llmd.prism.h{_h:g}.fixed_headroom", _h, FIXED_HEADROOM, False) for _h in SPEED_UPS),
    ("llmd.prism.with_governors", SPEED_UPS[0], None, True),
):
    _set = "every setting at its default" if _headroom is None else f"scaling.headroom {_headroom}, nothing learned"
    _pods = ", pods with governors" if _governors else ""
    for _name, _unit, _value in MEASURES:
        COLLECTORS[f"{_prefix}.{_name}"] = _figure(
            _unit,
            f"{RAMP_HOW}, H = {_speed_up:g}, {_set}{_pods}",
            _prism(_value, _speed_up, _headroom, _governors),
            RAMP_SEEDS,
        )
PARETO_HOW = f"{COMMAND}: {len(EPISODES)} traces, {len(BASELINES)} baselines; every cell in {CELLS.name}"
OTHER_HOW = f"{COMMAND}: {EPISODES[0].name}, prism minus budget-only, seeds that are not in the table"
COLLECTORS |= {
    "pareto.cells": _figure(
        "cells", PARETO_HOW, lambda: [float(sum(row["policy"] != "prism" for row in cells()))], PARETO_SEEDS
    ),
    "pareto.dominated_cells": _figure(
        "cells", PARETO_HOW, lambda: [float(sum(row["dominates_prism"] for row in cells()))], PARETO_SEEDS
    ),
    "pareto.other_seeds.attainment_points": _figure(
        "points",
        OTHER_HOW,
        lambda: [100 * (prism.attainment - alone.attainment) for prism, alone in other_seeds()],
        OTHER_SEEDS,
    ),
    "pareto.other_seeds.replica_hours": _figure(
        "hours",
        OTHER_HOW,
        lambda: [prism.replica_hours - alone.replica_hours for prism, alone in other_seeds()],
        OTHER_SEEDS,
    ),
    "quality.floor_violations": _figure(
        "requests", f"{COMMAND}: all ramps and traces under Prism", lambda: [float(floor_violations())], PARETO_SEEDS
    ),
    "tick.seconds_per_1000_services": _figure(
        "CPU s", "python -m prism_operator.plan_bench: 1,000 services of 10 pods and 3 classes", _tick, TICK_SEEDS
    ),
    "sim.times_real_time": _figure(
        "simulated s per CPU s", f"{COMMAND}: 100 pods, one core", times_real_time, range(3)
    ),
} | {name: _figure(unit, command, _elsewhere(command)) for name, (unit, command) in BESIDE.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.planner", description="Re-take the planner's figures.")
    ids = ", ".join(COLLECTORS)
    parser.add_argument("--only", nargs="+", choices=COLLECTORS, metavar="ID", help=f"re-take these alone: {ids}")
    traces = [one.name for one in EPISODES]
    parser.add_argument(
        "--table",
        nargs="*",
        choices=traces,
        metavar="TRACE",
        help=f"the Pareto table alone, of these: {', '.join(traces)}",
    )
    parser.add_argument(
        "--most-seconds", type=float, default=math.inf, help="play no more than this of each trace (default: all)"
    )
    arguments = parser.parse_args()
    if arguments.table is not None or not arguments.only:
        take_cells(arguments.table or traces, arguments.most_seconds)
    wanted = (
        [] if arguments.table is not None else [name for name in COLLECTORS if name in (arguments.only or COLLECTORS)]
    )
    names = [name for name in wanted if name not in BESIDE or name not in load(OUT)]
    figures.take_into(OUT, COLLECTORS, names, None, partial(print, file=sys.stderr, flush=True))
    figures.fill_in(OUT, COLLECTORS, NEVER_TAKEN)
    return page.main([])


if __name__ == "__main__":
    sys.exit(main())
