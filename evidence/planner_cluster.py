"""The simulator beside the system: one burst slice on the local cluster, and the same in simulation.

    python -m evidence.planner_cluster                      three demos on the local cluster, then their simulation
    python -m evidence.planner_cluster --report FILE...     from reports of demos that were run before
    python -m evidence.planner_cluster --simulate-only      what the simulation says; no cluster, no figure

The cluster runs what `make demo` runs: the operator's image, pods paced by a profile, an open-loop load generator, the
shipped slice of a public trace. The simulation gets the same requests, the same profile, service and pace of the slow
loop, pods that take as long to start, random routing as kube-proxy has it, and pods that start requests by their
deadlines and have governors; what is random in it is averaged over seeds. Compared is the share of requests that met
both objectives, with the budget moved and with it held at full: if only one of the two agreed, the other would have
been luck.

Writes `sim.minus_cluster_attainment_points` (the elastic service) and `sim.minus_cluster_attainment_points.held` into
evidence/planner.json, one value a demo. A demo on a machine that could not keep the pods' pace says so in its report,
and is no evidence.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evidence.figures import ROOT, Figure, NotTaken, absent, measured, merge
from evidence.planner import CLUSTER, CLUSTER_COMMAND, COLLECTORS, OUT
from examples.demo import foresight, trace
from examples.demo.report import ELASTIC, HELD
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.workload import SimRequest
from prism_operator.simulate.world import World

DEMO_REPORT = ROOT / "build" / "demo" / "report.json"
IDS = dict(zip((ELASTIC, HELD), CLUSTER, strict=True))
CONTROLS = {ELASTIC: "Auto", HELD: "Off"}
DEMOS, SEEDS = 3, tuple(range(20))
MOST_LAG = 0.05
"""Share of busy time by which steps may miss their pace; beyond it latencies are the machine's, not the profile's."""
PACE = "demo"

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Attainment of one service over the seeds."""

    mean: float
    deviation: float


@cache
def simulated(which: str, path: Path) -> Simulated:
    """Attainment of the demo's service `which` on the slice at `path`."""
    arrivals = trace.load(path)
    profile = foresight.read_profile(PACE)
    policy = foresight.policy(profile, CONTROLS[which])
    taken = []
    for seed in SEEDS:
        world = World(seed=seed, random_routing=True, by_deadline=True, governors=True)
        fleet = Fleet(policy, profile, policy.min_replicas, lambda n: foresight.POD_READY_S, world=world)
        requests = [SimRequest(a.at_s, policy.default_class, a.prompt_tokens, a.output_tokens) for a in arrivals]
        fleet.run(requests, arrivals[-1].at_s + foresight.TAIL_S)
        taken.append(fleet.attainment())
    return Simulated(statistics.fmean(taken), statistics.stdev(taken))


def differences(which: str, reports: Sequence[Report], simulation: float) -> list[float]:
    """Points of attainment, simulated minus measured, one a demo. Raises NotTaken for a demo that is no evidence."""
    found = []
    for number, report in enumerate(reports, start=1):
        summary = report["summaries"].get(which)
        if summary is None or summary["attainment"] is None:
            raise NotTaken(f"demo {number} has no answers of the service '{which}'")
        lag = summary["lag_share"]
        if lag is None or lag > MOST_LAG:
            said = "is not known" if lag is None else f"is {lag:.1%}"
            raise NotTaken(
                f"demo {number}: the time by which pods missed their pace {said}, and may be {MOST_LAG:.0%} at most; "
                "run it again while nothing else runs on this machine"
            )
        if summary["failed"]:
            raise NotTaken(f"demo {number}: {summary['failed']} requests failed, which the simulation does not know")
        found.append(100 * (simulation - summary["attainment"]))
    return found


def run_demos(count: int) -> list[Report]:
    """Reports of that many demos, one after the other. Raises NotTaken if one fails, with the end of what it said."""
    reports = []
    for _ in range(count):
        DEMO_REPORT.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "examples.demo"]
        run = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if run.returncode or not DEMO_REPORT.exists():
            raise NotTaken(
                f"'{' '.join(argv[1:])}' failed (exit {run.returncode}): {' '.join(run.stdout.split()[-60:])}"
            )
        reports.append(json.loads(DEMO_REPORT.read_text()))
    return reports


def figures(reports: Sequence[Report], path: Path) -> list[Figure]:
    """Both figures; what cannot be taken says why."""
    how = f"{CLUSTER_COMMAND}: {path.name}, {len(reports)} demos, {len(SEEDS)} simulations"
    made = []
    for which, name in IDS.items():
        try:
            values = differences(which, reports, simulated(which, path).mean)
            made.append(measured(name, values, "points", how, list(SEEDS)))
        except NotTaken as error:
            made.append(absent(name, "points", how, str(error)))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog=CLUSTER_COMMAND, description="Compare the simulator with the local cluster.")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="reports of demos that were run before")
    parser.add_argument("--demos", type=int, default=DEMOS, help=f"demos to run (default {DEMOS})")
    parser.add_argument("--simulate-only", action="store_true", help="print the simulation and take no figure")
    arguments = parser.parse_args()
    path = trace.SHIPPED
    for which in IDS:
        one = simulated(which, path)
        print(f"simulated, {which}: attainment {one.mean:.3f}, standard deviation {one.deviation:.3f}", flush=True)
    if arguments.simulate_only:
        return 0
    try:
        if arguments.report:
            reports: list[Report] = [json.loads(file.read_text()) for file in arguments.report]
        else:
            reports = run_demos(arguments.demos)
        taken = figures(reports, path)
    except NotTaken as error:
        taken = [absent(name, "points", CLUSTER_COMMAND, str(error)) for name in IDS.values()]
    for figure in taken:
        merge(OUT, figure, tuple(COLLECTORS))
        print(f"{figure.id}: {figure.value if figure.why is None else f'not taken: {figure.why}'}")
    return 0 if all(figure.why is None for figure in taken) else 1


if __name__ == "__main__":
    sys.exit(main())
