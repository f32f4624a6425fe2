"""Goodput of batching policies over HTTP, in real time: a pod a policy, paced by the demo's profile, and the same
requests of public traces to each at the same moments.

    python -m evidence.runtime_paced                    every seed, five minutes each; prints every run
    python -m evidence.runtime_paced --serve POLICY     one pod: prints its ports, serves until its standard input ends

A pod is what a container runs: server, engine, scheduler and kernels of the embedded model; a step that is done before
its profile's time waits. Its two classes, their objectives and the load are those of `evidence.runtime_goodput`, which
asks the same of the scheduler alone in virtual time. The pods' governors rest, so that policies alone are compared.
Latencies count at the client, from the moment at which the trace sends a request; all pods share one client.
"""

import argparse
import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import aiohttp

from evidence.figures import ROOT, NotTaken
from evidence.planner_cluster import MOST_LAG
from evidence.runtime_goodput import (
    BULK,
    GOLD,
    LOAD,
    MOST_IN,
    MOST_OUT,
    TRACES_PLAYED,
    Pod,
    arrivals,
    capacity,
    goodput_over,
    pod_of,
)
from examples.demo import prompts
from examples.demo.observe import pod_sample
from examples.demo.records import Answer
from examples.demo.replay import Client
from examples.demo.trace import Arrival
from prism_api.control import ClassDirective, Directive, Envelope, GovernorSettings, ServiceReference
from prism_runtime.engine.batching import POLICIES
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.governor import CLASS_SLOTS
from prism_runtime.engine.pace import Pacer, load_profile
from tests.runtime.serving.process import serving

ARTIFACT = ROOT / "examples" / "model" / "artifact"
PACE = "demo"
SPAN_S = 120.0
"""Of each trace, from where the replay in virtual time begins."""
TIMEOUT_S, READY_S = 90.0, 60.0
NAMES = {GOLD: "gold", BULK: "bulk"}
NEVER_HOT, NEVER_COOL = 2000, 1
"""Saturations in per-mille at which a governor moves: none that a pod sees."""
CLASS_HEADER, SERVED_NAME = "x-prism-class", "small-moe"


@dataclass(frozen=True, slots=True)
class Run:
    """What the clients of one pod saw of one trace. `lag_share`: of busy time, by which steps missed their pace."""

    seconds: float
    arrived: Counter[int]
    met: Counter[int]
    lag_share: float

    @property
    def goodput(self) -> float:
        """Requests a second that met all objectives."""
        return self.met.total() / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a trace and the class of each."""

    arrivals: Sequence[Arrival]
    classes: Sequence[int]


def paced_pod() -> Pod:
    return pod_of(load_profile(PACE))


def load_of(pod: Pod, trace: str, seed: int, span_s: float) -> Load:
    """The same share of the pod's capacity as in virtual time."""
    piece = {"seed": seed, "start_s": TRACES_PLAYED[trace], "span_s": span_s, "most_in": MOST_IN, "most_out": MOST_OUT}
    rate = LOAD * capacity(pod, arrivals(trace, rate=1.0, **piece))
    taken = [Arrival(one.at_s, one.input_tokens, one.output_tokens) for one in arrivals(trace, rate=rate, **piece)]
    draws = Random(seed)
    return Load(taken, [GOLD if draws.random() < pod.gold_share else BULK for _ in taken])


def directive(pod: Pod) -> Directive:
    """Gold at full alone, bulk down to its floor; both stand at full, and no governor moves them."""

    def ordered(slot: int, floor: str, priority: int) -> ClassDirective:
        ttft_ms, tpot_ms = round(1000 * pod.ttft_s), round(1000 * pod.tpot_s)
        return ClassDirective(
            name=NAMES[slot],
            priority=priority,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            point="full",
            floor=floor,
            ceiling="full",
        )

    return Directive(
        service=ServiceReference(namespace="local", name="local", uid="local"),
        holder="evidence",
        epoch=1,
        sequence=1,
        default_class=NAMES[BULK],
        classes=[ordered(GOLD, "full", 10), ordered(BULK, pod.bulk_floor, 0)],
        envelope=Envelope(ttl_ms=86_400_000, safe_point=pod.bulk_floor),
        governor=GovernorSettings(high=NEVER_HOT, low=NEVER_COOL),
        reason="Evidence",
    )


async def serve(policy: str) -> None:
    """One pod under a policy; says its ports in a line of JSON, and ends with its standard input."""
    profile = load_profile(PACE)
    engine = Engine.from_artifact(
        ARTIFACT,
        max_sequences=profile.max_sequences,
        max_context_tokens=MOST_IN + MOST_OUT,
        kv_tokens=profile.kv_tokens,
        prefill_tokens_per_step=profile.prefill_tokens_per_step,
        threads=1,
        classes=CLASS_SLOTS,
        policy=policy,
    )
    engine.costs.take(profile)
    pacer = Pacer(profile, engine.ladder)
    async with serving(engine, profile=profile, pacer=pacer, no_profile=True, class_header=CLASS_HEADER) as served:
        served.process.engine_loop.apply(directive(paced_pod()))
        served.process.accounting.follow(served.process.engine_loop.classes)
        print(json.dumps(served.ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def pods(policies: Iterable[str] = tuple(POLICIES)) -> AsyncIterator[Mapping[str, Mapping[str, int]]]:
    """A pod of each policy, a process of its own: its ports. Raises NotTaken if one does not start."""
    argv = [sys.executable, "-m", "evidence.runtime_paced", "--serve"]
    started: dict[str, Process] = {}
    try:
        for policy in policies:
            started[policy] = await asyncio.create_subprocess_exec(*argv, policy, cwd=ROOT, stdin=PIPE, stdout=PIPE)
        yield {policy: await _ports(policy, process) for policy, process in started.items()}
    finally:
        for process in started.values():
            if process.stdin is not None:
                process.stdin.close()
        await asyncio.gather(*(process.wait() for process in started.values()))


async def _ports(policy: str, process: Process) -> Mapping[str, int]:
    assert process.stdout is not None
    async with asyncio.timeout(READY_S):
        async for line in process.stdout:  # a log may come first
            said = json.loads(line)
            if "message" not in said:
                return {name: int(port) for name, port in said.items()}
    raise NotTaken(f"the pod under the policy '{policy}' ended before it served")


async def play(load: Load, ports: Mapping[str, Mapping[str, int]], tokens: Sequence[int], first: int) -> dict[str, Run]:
    """The load to every pod at once; `first` numbers the prompts, so that none comes twice."""
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        before = {policy: await _lag(session, each) for policy, each in ports.items()}
        began_s = time.monotonic()

        async def one(policy: str, index: int) -> Answer:
            url = f"http://127.0.0.1:{ports[policy]['port']}"
            client = Client(session, url, SERVED_NAME, tokens, lambda: time.monotonic() - began_s, TIMEOUT_S)
            headers = {CLASS_HEADER: NAMES[load.classes[index]]}
            return await client.send(first + index, load.arrivals[index], headers)

        sends = {policy: [one(policy, index) for index in range(len(load.arrivals))] for policy in ports}
        answers = dict(
            zip(sends, await asyncio.gather(*(asyncio.gather(*each) for each in sends.values())), strict=True)
        )
        after = {policy: await _lag(session, each) for policy, each in ports.items()}
    pod, runs = paced_pod(), {}
    for policy, each in answers.items():
        met = Counter(load.classes[n] for n, answer in enumerate(each) if is_met(answer, pod))
        busy_s, lag_s = (now - then for now, then in zip(after[policy], before[policy], strict=True))
        runs[policy] = Run(load.arrivals[-1].at_s, Counter(load.classes), met, lag_s / busy_s if busy_s else 0.0)
    return runs


async def _lag(session: aiohttp.ClientSession, ports: Mapping[str, int]) -> tuple[float, float]:
    """(busy seconds, those of them by which steps missed their pace)."""
    async with session.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics") as response:
        sample = pod_sample(await response.text())
    return sample.busy_s, sample.lag_s


def is_met(answer: Answer, pod: Pod) -> bool:
    """Whether a request got its whole answer, within both objectives. An answer of one token has no pace."""
    if answer.outcome != "finished" or answer.ttft_s is None or answer.ttft_s > pod.ttft_s:
        return False
    return answer.tpot_s is None or answer.tpot_s <= pod.tpot_s


async def compare(seed: int, span_s: float = SPAN_S) -> dict[str, dict[str, Run]]:
    """Runs by policy and trace. Raises NotTaken on a machine that cannot keep the pods' pace."""
    pod, tokens, runs = paced_pod(), prompts.held_out_tokens(), dict[str, dict[str, Run]]()
    async with pods() as ports:
        first = 0
        for trace in TRACES_PLAYED:
            load = load_of(pod, trace, seed, span_s)
            for policy, run in (await play(load, ports, tokens, first)).items():
                runs.setdefault(policy, {})[trace] = run
            first += len(load.arrivals)
    worst = max(run.lag_share for by_trace in runs.values() for run in by_trace.values())
    if worst > MOST_LAG:
        raise NotTaken(
            f"seed {seed}: pods missed their pace by {worst:.1%} of their time, {MOST_LAG:.0%} at most may be; "
            "run it again while nothing else runs on this machine"
        )
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve", choices=POLICIES, metavar="POLICY", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--seconds", type=float, default=SPAN_S, help="of each trace (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return 0
    for seed in arguments.seeds:
        runs = asyncio.run(compare(seed, arguments.seconds))
        for policy, by_trace in runs.items():
            for trace, one in by_trace.items():
                met = {NAMES[slot]: round(one.met[slot] / max(1, one.arrived[slot]), 3) for slot in NAMES}
                text = f"goodput {one.goodput:.3f}/s met {met} of {one.arrived.total()} lag {one.lag_share:.1%}"
                print(f"seed {seed} {trace:15s} {policy:6s} {text}")
        over = {name: round(goodput_over(runs, name), 3) for name in POLICIES if name != "slack"}
        print(f"seed {seed} slack over {over}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
