"""Figures of the runtime: times the kernels and the engine on this machine's CPU, and writes evidence/runtime.json.

    python -m evidence.runtime                  all of them, an hour of a quiet machine
    python -m evidence.runtime --only ID...     these, keeping the others

Nothing here is typed by hand: a figure that cannot be taken is null and says why. Speeds are ratios of CPU times of one
process, never times: how they are taken is told in `evidence.runtime_bench`.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console

from evidence import figures
from evidence import runtime_bench as bench
from evidence import runtime_goodput as replay
from evidence import runtime_paced as paced
from evidence.figures import ROOT, NotTaken
from evidence.slice import SAME_LOGITS, SAME_TOKENS, outcomes, passed_parameters

OUT = Path(__file__).with_name("runtime.json")
COMMAND = "python -m evidence.runtime"
LAYER_ROUNDS = 5
SEEDS = (0, 1, 2)
"""Of the prompts, one round of the engine each."""
REPLAY_SEEDS = tuple(range(5))
"""Of the traces' thinning, the classes of requests and the noise of steps."""
SOAK_SEED = 0
ARCHITECTURES = "tests/runtime/test_architectures.py"


class Runs:
    """The measurements, each made once however many figures it gives."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @cached_property
    def layer(self) -> list[dict[int, bench.Times]]:
        """Rounds of times by number of tokens."""
        self._console.print("Timing a layer of OLMoE's shape")
        layer = bench.Layer()
        return [bench.layer_round(layer) for _ in range(LAYER_ROUNDS)]

    @cached_property
    def threads(self) -> list[dict[int, bench.Times]]:
        """Rounds of wall times by number of tokens, on one thread and on two."""
        self._console.print("Timing that layer on two threads")
        layer = bench.Layer()
        return [bench.thread_round(layer) for _ in range(LAYER_ROUNDS)]

    @cached_property
    def embedded(self) -> list[dict[int, bench.Times]]:
        """Rounds of times by batch."""
        return self._engine(bench.embedded)

    @cached_property
    def larger(self) -> list[dict[int, bench.Times]]:
        """Rounds of times by batch, at half the budget too."""
        return self._engine(bench.larger)

    def _engine(self, make: Callable[[], bench.Subject]) -> list[dict[int, bench.Times]]:
        self._console.print(f"Timing the engine with the {make.__name__} model")
        subject = make()
        return [bench.engine_round(subject, seed) for seed in SEEDS]

    @cached_property
    def soak(self) -> dict[str, float]:
        """Counts of one soak, in a process whose memory is its own."""
        self._console.print("Soaking a server with 10,000 requests")
        argv = [sys.executable, "-m", "evidence.runtime_soak", "--seed", str(SOAK_SEED)]
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise NotTaken(f"'{' '.join(argv[1:])}' ended with status {done.returncode}")
        counts: dict[str, float] = json.loads(done.stdout)
        return counts

    @cached_property
    def replays(self) -> list[dict[str, dict[str, replay.Outcome]]]:
        """Outcomes by policy and trace, by seed, on one measured profile."""
        self._console.print("Measuring the larger model's steps, and replaying traces on them")
        profile = replay.measured_profile()
        return [replay.compare(profile, seed) for seed in REPLAY_SEEDS]

    @cached_property
    def paced(self) -> list[dict[str, dict[str, paced.Run]]]:
        """The same over HTTP and in real time, by seed."""
        self._console.print("Replaying traces to paced pods, five minutes a seed")
        return [asyncio.run(paced.compare(seed)) for seed in REPLAY_SEEDS]

    @cached_property
    def architectures(self) -> dict[str, str]:
        """Outcomes of the tests of the architectures, by name."""
        with tempfile.TemporaryDirectory() as scratch:
            junit = Path(scratch) / "junit.xml"
            argv = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={junit}", ARCHITECTURES]
            subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
            if not junit.exists():
                raise NotTaken(f"'pytest {ARCHITECTURES}' ended without a report")
            return outcomes(junit)

    @cached_property
    def spilled(self) -> list[int]:
        """Bytes that each compiled Triton program spills, over the gated targets."""
        try:
            from prism_runtime.kernels import aot
        except ImportError as error:
            raise NotTaken(f"Triton cannot be imported: {error}") from error
        return [usage.spilled for variants in aot.table().values() for usage in variants.values()]


Values = Sequence[float | None]


def _figure(
    unit: str, take: Callable[[Runs], Values], seeds: Sequence[int] = (), how: str = COMMAND
) -> figures.Collector[Runs]:
    return figures.Collector(unit, how, take, seeds)


def _half_over_full(kernel: str, runs: Runs) -> Values:
    _needs_compiler(kernel)
    return [max(times[f"{kernel}.half"] / times[f"{kernel}.full"] for times in each.values()) for each in runs.layer]


def _threshold_over_full(tokens: int, runs: Runs) -> Values:
    _needs_compiler("cpp")
    return [each[tokens]["cpp.threshold"] / each[tokens]["cpp.full"] for each in runs.layer]


def _over_transformers(runs: Runs) -> Values:
    _needs_compiler("cpp")
    return [min(times["transformers"] / times["cpp.full"] for times in each.values()) for each in runs.layer]


def _two_threads(tokens: int, runs: Runs) -> Values:
    _needs_compiler("cpp")
    if (os.cpu_count() or 1) < 2:
        raise NotTaken("this machine has one processor")
    return [each[tokens]["1"] / each[tokens]["2"] for each in runs.threads]


def _needs_compiler(kernel: str) -> None:
    if kernel == "cpp" and not bench.cpu_moe.available():
        raise NotTaken("there is no C compiler here, and no compiled kernel")


def _engine_over(other: str, batch: int, runs: Runs) -> Values:
    """Of both models the one where the engine gains less."""
    rounds = zip(runs.embedded, runs.larger, strict=True)
    return [min(each[batch][other] / each[batch]["full"] for each in both) for both in rounds]


def _half_over_full_engine(runs: Runs) -> Values:
    return [min(times["full"] / times["half"] for times in each.values()) for each in runs.larger]


def _equal_architectures(runs: Runs) -> Values:
    by_name = runs.architectures
    both = passed_parameters(by_name, SAME_LOGITS) & passed_parameters(by_name, SAME_TOKENS)
    if not both:
        raise NotTaken(f"no architecture passed both tests of {ARCHITECTURES}")
    return [len(both)]


def _soaked(count: str, runs: Runs) -> Values:
    return [runs.soak[count]]


def _goodput_over(policy: str, runs: Runs) -> Values:
    return [replay.goodput_over(outcomes, policy) for outcomes in runs.paced]


def _virtual_goodput_over(policy: str, runs: Runs) -> Values:
    return [replay.goodput_over(outcomes, policy) for outcomes in runs.replays]


COLLECTORS = {
    "layer.half_over_full.cpp": _figure("ratio", partial(_half_over_full, "cpp")),
    "layer.half_over_full.torch": _figure("ratio", partial(_half_over_full, "torch")),
    **{
        f"layer.threshold_over_full.t{tokens}": _figure("ratio", partial(_threshold_over_full, tokens))
        for tokens in bench.TOKENS
    },
    "layer.speedup_over_transformers.cpp": _figure("ratio", _over_transformers),
    **{f"layer.two_threads.t{tokens}": _figure("ratio", partial(_two_threads, tokens)) for tokens in bench.TOKENS},
    **{
        f"engine.over_{name}.b{batch}": _figure("ratio", partial(_engine_over, variant, batch), SEEDS)
        for name, variant in (("generate", "generate"), ("continuous_batching", "batching"))
        for batch in bench.BATCHES
    },
    "engine.half_over_full": _figure("ratio", _half_over_full_engine, SEEDS),
    **{
        f"goodput.{name}": _figure("ratio", partial(take, policy), REPLAY_SEEDS)
        for prefix, take in (("", _goodput_over), ("in_virtual_time.", _virtual_goodput_over))
        for name, policy in ((f"{prefix}over_fifo", "fifo"), (f"{prefix}over_paper_policy", "paper"))
    },
    **{
        f"soak.{count}": _figure(unit, partial(_soaked, count), (SOAK_SEED,))
        for count, unit in (
            ("requests", "requests"),
            ("failed_requests", "requests"),
            ("leaked_blocks", "blocks"),
            ("rss_growth_megabytes", "MB"),
        )
    },
    "aot.kernels": _figure("programs", lambda runs: [len(runs.spilled)]),
    "aot.spills": _figure("programs", lambda runs: [sum(spilled > 0 for spilled in runs.spilled)]),
    "equal.architectures": _figure("architectures", _equal_architectures, how=f"python -m pytest {ARCHITECTURES}"),
}
NEVER_TAKEN = "not taken yet; run: make evidence-runtime"


collect = partial(figures.collect, COLLECTORS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.runtime", description="Re-take the published figures.")
    ids = ", ".join(COLLECTORS)
    parser.add_argument("--only", nargs="+", choices=COLLECTORS, metavar="ID", help=f"re-take these alone: {ids}")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)
    runs = Runs(console)
    names = [name for name in COLLECTORS if name in (arguments.only or COLLECTORS)]
    figures.take_into(OUT, COLLECTORS, names, runs, partial(console.print, highlight=False))
    figures.fill_in(OUT, COLLECTORS, NEVER_TAKEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
