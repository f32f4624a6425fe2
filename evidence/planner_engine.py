"""The simulator beside the real engine on this CPU: the same requests to both.

    python -m evidence.planner_engine                 twenty runs of half a minute, and their simulation
    python -m evidence.planner_engine --seconds 5     a shorter look; takes no figure

The pods of `evidence.planner_cluster` are paced, so they cost what the profile says by construction. Here nothing is
paced: the engine computes the embedded model as fast as one core does, its profile is measured as users measure theirs,
and the simulated pod is given that profile. Both start requests in order of arrival. Played are pieces of two public
traces, one steady and one of bursts, thinned or repeated to `LOAD` of the capacity, at `full` and at the lowest
point. Time is CPU time of the engine, for profile and run alike, and passes at once while it has nothing to do: what
else a shared machine does meanwhile is no error of the simulator. No HTTP is between: its cost is no step's.

Writes `sim.over_engine.*` into evidence/planner.json: simulated over measured quantiles of the latencies, one value a
seed, over all traces and points.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from evidence.figures import ROOT, measured, merge
from evidence.planner import COLLECTORS, ENGINE, ENGINE_COMMAND, OUT
from evidence.runtime_goodput import MOST_IN, MOST_OUT, TRACES_PLAYED, Arrival, arrivals, capacity, pod_of
from prism_api import FULL
from prism_api.profile import Profile
from prism_operator.simulate.engine import SimPod
from prism_operator.simulate.engine_model import EngineModel
from prism_operator.simulate.score import quantiles
from prism_operator.simulate.workload import SimRequest
from prism_operator.simulate.world import World
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.profiling import Limits, measure_profile
from prism_runtime.engine.types import Plan, Request, Sampling, Token
from prism_runtime.server.serve import load_engine

ARTIFACT = ROOT / "examples" / "model" / "artifact"
LIMITS = Limits(
    max_sequences=16, max_context_tokens=MOST_IN + MOST_OUT, prefill_tokens_per_step=256, kv_tokens=16 * 512
)
LOAD = 0.6
"""Of what the pod can do at `full` with a full batch, on average; bursts are beyond it."""
SPAN_S = 30.0
SEEDS = tuple(range(5))
CLASS = "default"
SHARES = {"p50": 0.5, "p95": 0.95}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the requests of some runs, seconds."""

    ttft_s: Sequence[float]
    tpot_s: Sequence[float]

    def __add__(self, other: "Latencies") -> "Latencies":
        return Latencies([*self.ttft_s, *other.ttft_s], [*self.tpot_s, *other.tpot_s])

    def quantiles(self) -> dict[str, float]:
        """By the names of the figures; of at least one request."""
        return {
            f"{name}_{share}": value
            for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s))
            for share, value in zip(SHARES, quantiles(values, tuple(SHARES.values())), strict=True)
            if value is not None
        }


def serve(engine: Engine, load: Sequence[Arrival], point: str, seed: int) -> Latencies:
    """A request arrives when the trace says so, also during a step; prompts share nothing."""
    draws, vocabulary = Random(seed), engine.vocabulary_size
    engine.set_plan(Plan(engine.plan.version + 1, (engine.ladder.index(point),) * CLASS_SLOTS))
    prompts = [tuple(draws.randrange(vocabulary) for _ in range(one.input_tokens)) for one in load]
    times: list[list[float]] = [[] for _ in load]
    coming, now_s = 0, 0.0
    while coming < len(load) or engine.has_work:
        while coming < len(load) and load[coming].at_s <= now_s:
            sampling = Sampling(load[coming].output_tokens, temperature=0.0)
            engine.submit(Request(str(coming), prompts[coming], sampling))
            coming += 1
        if not engine.has_work:
            now_s = load[coming].at_s
            continue
        began_s = time.process_time()
        report = engine.step()
        now_s += time.process_time() - began_s
        for event in report.events:
            if isinstance(event, Token):
                times[int(event.request_id)].append(now_s)
    return Latencies(
        [at[0] - one.at_s for one, at in zip(load, times, strict=True)],
        [(at[-1] - at[0]) / (len(at) - 1) for at in times if len(at) > 1],
    )


def simulate(profile: Profile, load: Sequence[Arrival], point: str, seed: int) -> Latencies:
    """The same on one simulated pod."""
    world = World(seed=seed)
    model = EngineModel.of(profile, (CLASS,), dict.fromkeys(profile.points, 1.0), world.step_noise)
    pod = SimPod("pod-0", 0, 0.0, 0.0, model, {CLASS: point}, world.stream("steps"))
    requests = [SimRequest(one.at_s, CLASS, one.input_tokens, one.output_tokens) for one in load]
    for request in requests:
        while (wake_s := pod.wake_s) is not None and wake_s <= request.arrived_s:
            pod.advance(wake_s)
        pod.submit(request, request.arrived_s)
    while (wake_s := pod.wake_s) is not None:
        pod.advance(wake_s)
    return Latencies(
        [request.ttft_s for request in requests],
        [tpot for request in requests if (tpot := request.tpot_s) is not None],
    )


def over(simulated: Latencies, taken: Latencies) -> Mapping[str, float]:
    """Simulated over measured, by the names of the figures."""
    measured_s = taken.quantiles()
    return {name: value / measured_s[name] for name, value in simulated.quantiles().items()}


def ratios(seconds: float, seeds: Sequence[int]) -> list[Mapping[str, float]]:
    """One entry a seed. The profile is measured before each, for a machine's speed changes with its load."""
    engine = load_engine(ARTIFACT, LIMITS, threads=1, policy="fifo")
    found = []
    for seed in seeds:
        profile = measure_profile(engine, LIMITS, accelerator="cpu", clock=time.process_time)
        simulated = taken = Latencies((), ())
        for trace, start_s in TRACES_PLAYED.items():
            piece = {"seed": seed, "start_s": start_s, "span_s": seconds, "most_in": MOST_IN, "most_out": MOST_OUT}
            rate = LOAD * capacity(pod_of(profile), arrivals(trace, rate=1.0, **piece))
            load = arrivals(trace, rate=rate, **piece)
            for point in (FULL, engine.ladder.names[0]):
                real, model = serve(engine, load, point, seed), simulate(profile, load, point, seed)
                print(f"seed {seed} {trace} {point}: {len(load)} requests, {_compared(model, real)}", flush=True)
                simulated, taken = simulated + model, taken + real
        found.append(over(simulated, taken))
    return found


def _compared(simulated: Latencies, taken: Latencies) -> str:
    real = taken.quantiles()
    return ", ".join(
        f"{name} {1000 * value:.1f} ms simulated, {1000 * real[name]:.1f} measured"
        for name, value in simulated.quantiles().items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog=ENGINE_COMMAND, description="Compare the simulator with the engine.")
    parser.add_argument("--seconds", type=float, default=SPAN_S, help="of each trace (default %(default)s)")
    arguments = parser.parse_args()
    by_seed = ratios(arguments.seconds, SEEDS)
    for name in ENGINE:
        values = [one[name.removeprefix("sim.over_engine.")] for one in by_seed]
        print(f"{name}: {statistics.fmean(values):.3f}")
        if arguments.seconds == SPAN_S:
            merge(OUT, measured(name, values, "times", ENGINE_COMMAND, list(SEEDS)), tuple(COLLECTORS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
