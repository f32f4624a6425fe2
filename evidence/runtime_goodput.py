"""Goodput of batching policies on one pod, in virtual time: the engine's own scheduler, policies and memory, steps that
take what a profile says, and requests of public traces. No model runs: `evidence.runtime_paced` asks it of whole pods.

    python -m evidence.runtime_goodput PROFILE.json      prints every run; of what `prism-runtime profile` prints

A pod serves two classes: gold at the full budget only, bulk between its floor and the full budget. Goodput is the rate
of requests that met every objective of their class; requests cut off by the end of the run count for nobody.
"""

import argparse
import csv
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Protocol

from prism_api.points import Ladder, OperatingPoint
from prism_api.profile import Profile
from prism_runtime.engine.batching import POLICIES
from prism_runtime.engine.blocks import BlockPool
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.profiling import Limits, measure_profile
from prism_runtime.engine.scheduler import Scheduler
from prism_runtime.engine.types import Promise, Request, Sampling

TRACES_PLAYED = {"azure2023_code": 600.0, "azure2023_conv": 300.0}
"""Traces and the second from which `SPAN_S` of each are played: a piece of bursts, and a steady one."""
SPAN_S = 600.0
LOAD = 0.8
"""Of what the pod can do at full budget with a full batch, on average: bursts are beyond it."""
MOST_IN, MOST_OUT = 384, 128
TTFT_PROMPTS, TPOT_STEPS = 10.0, 1.5
"""Objectives in the pod's own units: first tokens within the time to read so many of the longest prompts; tokens after
it within so many times the step of a half full batch that reads a sixteenth of the longest prompt beside it."""
TRACES = Path(__file__).parents[1] / "examples" / "traces"
GOLD, BULK = 0, 1
NOISE = 0.05
"""Log-normal deviation of a step from its profile, as in the planner's simulator."""


@dataclass(frozen=True, slots=True)
class Pod:
    """What is served: limits, the cost of steps, the objectives (seconds) and the share of gold requests."""

    profile: Profile
    ladder: Ladder
    bulk_floor: str
    ttft_s: float
    tpot_s: float
    gold_share: float = 0.3


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    input_tokens: int
    output_tokens: int


class Served(Protocol):
    """One run of a policy, whatever it was measured by."""

    @property
    def goodput(self) -> float: ...


@dataclass(slots=True)
class Outcome:
    """Of one run. Quality is the token-weighted budget of each class's answers, as a share."""

    seconds: float
    arrived: Counter[int]
    met: Counter[int]
    budget: dict[int, float]
    preemptions: int

    @property
    def goodput(self) -> float:
        """Requests a second that met all objectives."""
        return self.met.total() / self.seconds


def ladder_of(profile: Profile) -> Ladder:
    """Points named like b500 and `full`; their quality is not used here and says nothing."""
    budgets = {name: 1000 if name == "full" else int(name.removeprefix("b")) for name in profile.points}
    return Ladder(
        OperatingPoint(
            name=name,
            budget_permille=budget,
            policy="prefix",
            relative_quality=Decimal(budget) / 1000,
            relative_quality_low=Decimal(budget) / 1000,
        )
        for name, budget in budgets.items()
    )


def arrivals(
    trace: str, *, seed: int, start_s: float, span_s: float, rate: float, most_in: int, most_out: int
) -> list[Arrival]:
    """A seeded choice of a trace's requests in a window, thinned or repeated to `rate` requests a second on average.

    Times keep their bursts: each request is taken once, twice, ... or not at all; a copy comes within a second of its
    original. Token counts are clipped to the pod's context.
    """
    with (TRACES / f"{trace}.csv").open() as file:
        rows = [
            (float(row["t_s"]) - start_s, int(row["input_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(file)
        ]
    inside = [row for row in rows if 0 <= row[0] < span_s]
    draws, copies = random.Random(seed), rate * span_s / len(inside)
    taken = []
    for at_s, tokens_in, tokens_out in inside:
        for copy in range(int(copies) + (draws.random() < copies % 1)):
            later_s = draws.random() if copy else 0.0
            taken.append(Arrival(at_s + later_s, max(1, min(tokens_in, most_in)), max(2, min(tokens_out, most_out))))
    return sorted(taken, key=lambda arrival: arrival.at_s)


def play(pod: Pod, load: Sequence[Arrival], policy: str, seed: int) -> Outcome:
    """Serve `load` under a policy until the last request has arrived, in virtual time."""
    draws = random.Random(seed)
    costs, truth = StepCosts(pod.ladder), StepCosts(pod.ladder)
    costs.take(pod.profile)
    truth.take(pod.profile)
    full, floor = len(pod.ladder) - 1, pod.ladder.index(pod.bulk_floor)
    scheduler = Scheduler(
        BlockPool(pod.profile.kv_tokens // BLOCK_TOKENS),
        pod.profile.max_sequences,
        pod.profile.prefill_tokens_per_step,
        seed,
        POLICIES[policy](costs),
        len(pod.ladder),
    )
    outcome = Outcome(load[-1].at_s, Counter(), Counter(), {}, 0)
    spent, tokens = Counter[int](), Counter[int]()
    queue, now_s, done = list(reversed(list(_requests(pod, load, floor, draws)))), 0.0, False
    while not done:
        while queue and queue[-1][0] <= now_s:
            at_s, request = queue.pop()
            scheduler.enqueue(request, at_s)
            outcome.arrived[request.service_class] += 1
        decode, prefill = scheduler.schedule((full, full), now_s)
        done = not queue and now_s >= outcome.seconds
        if not decode and not prefill:
            now_s = queue[-1][0] if queue else outcome.seconds
            continue
        shape = [Counter[int](), Counter[int]()]
        for at, pieces in zip(shape, (decode, prefill), strict=True):
            for piece in pieces:
                at[piece.point] += piece.length
        context = sum(piece.sequence.cached for piece in decode)
        took_s = truth.seconds(shape[0], context, shape[1]) * draws.lognormvariate(0, NOISE)
        costs.observe(shape[0], context, shape[1], took_s)
        now_s += took_s
        for piece in (*decode, *prefill):
            sequence, complete = piece.sequence, piece.completes
            scheduler.advance(piece)
            if not complete:
                continue
            request = sequence.request
            sequence.tokens.append(draws.randrange(2**31))
            sequence.first_token_s = now_s if sequence.first_token_s is None else sequence.first_token_s
            spent[request.service_class] += pod.ladder.points[piece.point].budget_permille
            tokens[request.service_class] += 1
            if sequence.generated == request.sampling.max_tokens:
                scheduler.finish(sequence)
                in_time = sequence.first_token_s - sequence.arrived_s <= pod.ttft_s
                pace_s = (now_s - sequence.first_token_s) / (sequence.generated - 1)
                outcome.met[request.service_class] += in_time and pace_s <= pod.tpot_s
    outcome.budget = {one: spent[one] / tokens[one] / 1000 for one in tokens}
    outcome.preemptions = scheduler.counts.preemptions
    return outcome


def _requests(pod: Pod, load: Sequence[Arrival], floor: int, draws: random.Random) -> Iterator[tuple[float, Request]]:
    full = len(pod.ladder) - 1
    for index, arrival in enumerate(load):
        gold = draws.random() < pod.gold_share
        prompt = tuple(draws.randrange(2**31) for _ in range(arrival.input_tokens))
        promise = Promise(pod.ttft_s, pod.tpot_s, full if gold else floor)
        sampling = Sampling(arrival.output_tokens)
        request = Request(f"r{index}", prompt, sampling, GOLD if gold else BULK, 10 if gold else 0, promise)
        yield arrival.at_s, request


def capacity(pod: Pod, load: Sequence[Arrival]) -> float:
    """Requests a second that the pod's work would allow at full budget with a full batch: the unit of a load."""
    costs = StepCosts(pod.ladder)
    costs.take(pod.profile)
    full, batch = len(pod.ladder) - 1, pod.profile.max_sequences
    tokens_in = statistics.fmean(arrival.input_tokens for arrival in load)
    tokens_out = statistics.fmean(arrival.output_tokens for arrival in load)
    decode_s = costs.seconds({full: batch}, round(batch * (tokens_in + tokens_out / 2)), {}) / batch
    read_s = costs.seconds({}, 0, {full: 1000}) / 1000
    return 1 / (tokens_in * read_s + tokens_out * decode_s)


def pod_of(profile: Profile, bulk_floor: str = "b500") -> Pod:
    """A pod with objectives in its own units."""
    costs, ladder = StepCosts(ladder_of(profile)), ladder_of(profile)
    costs.take(profile)
    full, half_batch = len(ladder) - 1, max(1, profile.max_sequences // 2)
    read_s = costs.seconds({}, 0, {full: MOST_IN})
    step_s = costs.seconds({full: half_batch}, half_batch * (MOST_IN + MOST_OUT) // 2, {full: MOST_IN // 16})
    return Pod(profile, ladder, bulk_floor, TTFT_PROMPTS * read_s, TPOT_STEPS * step_s)


def measured_profile() -> Profile:
    """Of the random six-layer model that the other figures use, on this CPU, in CPU time: a minute of one core."""
    from evidence.runtime_bench import larger_model
    from prism_runtime.engine.engine import Engine
    from prism_runtime.kernels.plan import PlanTables
    from tests.runtime.models import COUNTS, SUB_EXPERTS, tiny_manifest

    limits = Limits(max_sequences=32, max_context_tokens=512, prefill_tokens_per_step=256, kv_tokens=32 * 384)
    model = larger_model()
    tables = PlanTables.uniform(COUNTS, model.config.num_hidden_layers, SUB_EXPERTS)
    engine = Engine(model, tables, tiny_manifest(), None, classes=CLASS_SLOTS, **asdict(limits))
    return measure_profile(engine, limits, accelerator="cpu", clock=time.process_time)


def compare(profile: Profile, seed: int, load: float = LOAD, bulk_floor: str = "b500") -> dict[str, dict[str, Outcome]]:
    """Outcomes by policy and trace; every policy serves the same requests."""
    pod, outcomes = pod_of(profile, bulk_floor), dict[str, dict[str, Outcome]]()
    for trace, start_s in TRACES_PLAYED.items():
        piece = {"seed": seed, "start_s": start_s, "span_s": SPAN_S, "most_in": MOST_IN, "most_out": MOST_OUT}
        rate = load * capacity(pod, arrivals(trace, rate=1.0, **piece))
        requests = arrivals(trace, rate=rate, **piece)
        for policy in POLICIES:
            outcomes.setdefault(policy, {})[trace] = play(pod, requests, policy, seed)
    return outcomes


def goodput_over(outcomes: Mapping[str, Mapping[str, Served]], baseline: str) -> float:
    """Goodput of the engine's own policy over a baseline's, all traces together."""
    own, other = (sum(one.goodput for one in outcomes[policy].values()) for policy in ("slack", baseline))
    return own / other


def main() -> int:
    parser = argparse.ArgumentParser(description="Goodput of batching policies on one pod, in virtual time.")
    parser.add_argument("profile", type=Path, nargs="?", help="default: measured here, for a minute")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--load", type=float, default=LOAD, help="of the pod's capacity at full budget")
    parser.add_argument("--floor", default="b500", help="of bulk; 'full' tells what the policies do without budgets")
    arguments = parser.parse_args()
    given = arguments.profile
    profile = Profile.model_validate_json(given.read_text()) if given else measured_profile()
    print(profile.model_dump_json())
    for seed in arguments.seeds:
        outcomes = compare(profile, seed, arguments.load, arguments.floor)
        for policy, by_trace in outcomes.items():
            for trace, one in by_trace.items():
                met = {name: round(one.met[c] / one.arrived[c], 3) for name, c in (("gold", GOLD), ("bulk", BULK))}
                budget = {name: round(one.budget[c], 3) for name, c in (("gold", GOLD), ("bulk", BULK))}
                print(f"seed {seed} {trace:15s} {policy:6s} goodput {one.goodput:.3f}/s met {met} budget {budget}")
        over = {name: round(goodput_over(outcomes, name), 3) for name in POLICIES if name != "slack"}
        print(f"seed {seed} slack over {over}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
