"""Time of a layer of OLMoE's shape on this GPU, at every budget, beside the stock implementations and the floor.

    python -m prism_runtime.kernels.gpu_bench                a table
    python -m prism_runtime.kernels.gpu_bench --json FILE    figures, too
    python -m prism_runtime.kernels.gpu_bench --sweep        which tile sizes are fast, for the constants of triton_moe

Every figure is the median over replays of a CUDA graph of eight calls with eight different batches, so that no call
finds in the cache what the one before it read. All of a layer's work is in it: the choice of cells, with the gate and
the compensation at threshold points, the routing tables, both products and the sum. The floor is the larger of two
times: bytes of the touched weights over the bandwidth measured here, and their arithmetic over the rate measured here.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import PREFIX, THRESHOLD, PlanTables, PlanTensor
from prism_runtime.kernels.triton_moe import DECODE, PREFILL, PREFILL_ATOMIC, Tile, Tiling, run_kept, sub_expert_moe

EXPERTS, TOP_K, NEURONS, HIDDEN = 64, 8, 1024, 2048
"""OLMoE-1B-7B's layer."""
SUB_EXPERTS = 4
FINE_SUB_EXPERTS = 16
"""Of 64 neurons: as fine as a tile of the products."""
TOKENS = (1, 8, 32, 128, 1024)
BATCHES = 8
RANK = 8
DTYPE = torch.bfloat16

Batch = tuple[Tensor, Tensor, Tensor]
"""hidden [T, H], expert_ids [T, K], router_weights [T, K]"""


def batch(tokens: int, generator: torch.Generator) -> Batch:
    hidden = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).to(DTYPE)
    router = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).softmax(-1)
    weights, ids = router.topk(TOP_K)
    return hidden, ids, weights


def batch_of_one() -> Batch:
    return batch(1, torch.Generator("cuda").manual_seed(0))


def batches(tokens: int) -> list[Batch]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return [batch(tokens, generator) for _ in range(BATCHES)]


@cache
def random_layer(sub_experts: int) -> ExpertWeights:
    generator = torch.Generator("cuda").manual_seed(0)
    neurons = NEURONS // sub_experts

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * shape[-1] ** -0.5).to(DTYPE)

    return ExpertWeights(
        random(EXPERTS, sub_experts, 2 * neurons, HIDDEN),
        random(EXPERTS, sub_experts, neurons, HIDDEN),
        None,
        None,
        silu_and_multiply,
    )


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def random_gate(sub_experts: int) -> GatedLayer:
    """A gate and a compensation of random weights: their cost is that of fitted ones, their choice is not."""
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator) * scale

    gate = GateWeights(
        weight=random(EXPERTS, sub_experts, HIDDEN, scale=HIDDEN**-0.5),
        bias=torch.zeros(EXPERTS, sub_experts, device="cuda"),
        mean=torch.zeros(EXPERTS, sub_experts, device="cuda"),
        deviation=torch.ones(EXPERTS, sub_experts, device="cuda"),
        token=random(HIDDEN + 3, scale=0.001),
        kappa=1.7,
    )
    compensation = CompensationWeights(
        random(HIDDEN + 1, RANK, scale=0.01),
        random(RANK, HIDDEN, scale=0.01),
        random(EXPERTS, sub_experts, RANK, scale=0.01),
    )
    return GatedLayer(gate, {0: compensation})


def ladder(sub_experts: int, tau: float) -> PlanTables:
    """A threshold point, then prefixes of a quarter, a half, three quarters and all."""
    counts = [0, sub_experts // 4, sub_experts // 2, 3 * sub_experts // 4, sub_experts]
    return PlanTables(
        mode=torch.tensor([THRESHOLD, *[PREFIX] * 4], dtype=torch.int32),
        count=torch.tensor(counts, dtype=torch.int32)[:, None, None],
        tau=torch.full((5, 1), tau),
        share=torch.ones(5, 1),
        cap=torch.zeros(5, dtype=torch.int32),
        sub_experts=sub_experts,
    )


def median_threshold(gated: GatedLayer, sub_experts: int) -> float:
    """Half of the cells of a random batch score above it."""
    plan = PlanTensor(ladder(sub_experts, 0.0), 1, "cuda")
    plan.write([0])
    hidden, ids, router = batches(128)[0]
    layer, rms = random_layer(sub_experts), torch.ones(128, device="cuda")
    low, high = -12.0, 4.0
    for _ in range(12):
        plan.tau.fill_((low + high) / 2)
        plan.attach_rows([0] * 128)
        plan.reset_counters()
        sub_expert_moe(hidden, ids, router, 0, plan, layer, gated, rms)
        low, high = ((low + high) / 2, high) if plan.realised_budget > 0.5 else (low, (low + high) / 2)
    return (low + high) / 2


def microseconds(call: Callable[[Batch], Any], inputs: Sequence[Batch], graphed: bool = True) -> float:
    """Median time of one call, over replays of a graph of one call a batch; without a graph over plain runs."""

    def all_calls() -> None:
        for one in inputs:
            call(one)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        all_calls()  # compiles, which a capture may not
        all_calls()
    torch.cuda.current_stream().wait_stream(warm)
    torch.cuda.synchronize()
    run = all_calls
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
        run()
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 3 / len(inputs))
    return statistics.median(times)


def stock(name: str) -> Callable[[Batch], Any]:
    """The layer as transformers runs it by its implementation of this name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=NEURONS, num_experts=EXPERTS, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_hidden_layers=1,
    )  # fmt: skip
    with torch.device("cuda"):
        experts = OlmoeExperts(config).to(DTYPE)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(False)
    run = ALL_EXPERTS_FUNCTIONS[name]
    return lambda one: run(experts, one[0], one[1], one[2].to(DTYPE))


class Floor:
    """What this GPU can do at best, measured once: reading memory, and multiplying."""

    def __init__(self) -> None:
        read = torch.randn(2**29, device="cuda")
        self.bytes_per_microsecond = read.nbytes / microseconds(lambda _: read.sum(), [batch_of_one()])
        square = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
        self.operations_per_microsecond = 2 * 8192**3 / microseconds(lambda _: square @ square, [batch_of_one()])

    def microseconds(self, tokens: int, budget: float) -> float:
        """For prefixes of the same length: the touched experts' share of the weights, and every row's products."""
        touched = statistics.fmean(len(ids.unique()) for _, ids, _ in batches(tokens))
        weights = touched * budget * 3 * NEURONS * HIDDEN
        operations = 2 * tokens * TOP_K * budget * 3 * NEURONS * HIDDEN
        return max(2 * weights / self.bytes_per_microsecond, operations / self.operations_per_microsecond)


def layer_times(sub_experts: int, tokens: int) -> Iterator[tuple[str, float]]:
    """Time at every point, and the realised budget of the threshold point."""
    weights, gated = random_layer(sub_experts), random_gate(sub_experts)
    plan = PlanTensor(ladder(sub_experts, median_threshold(gated, sub_experts)), 1, "cuda")
    rms, inputs = torch.ones(tokens, device="cuda"), batches(tokens)

    def call(one: Batch, with_gate: bool) -> Tensor:
        gate = (gated, rms) if with_gate else (None, None)
        return sub_expert_moe(*one, 0, plan, weights, *gate)

    for point, name in enumerate(("threshold", "b250", "b500", "b750", "full")):
        plan.write([point])
        plan.attach_rows([0] * tokens)
        plan.reset_counters()
        yield name, microseconds(partial(call, with_gate=point == 0), inputs)
        if point == 0:
            yield "threshold_realised", plan.realised_budget


ORDERS = {"by_slot": PREFILL, "by_sub_expert": PREFILL_ATOMIC}


def kept_half(tokens: int, how: Tiling) -> float:
    """Microseconds where every row runs a half of its own: what either order of work makes of it in prefill."""
    weights, inputs = random_layer(SUB_EXPERTS), batches(tokens)
    keep = torch.rand(tokens, TOP_K, SUB_EXPERTS, device="cuda", generator=torch.Generator("cuda").manual_seed(2)) < 0.5
    return microseconds(lambda one: run_kept(*one, keep, weights, how), inputs)


def report() -> dict[str, dict[str, float]]:
    """Microseconds by row of the table, printed as they come."""
    floor = Floor()
    found: dict[str, dict[str, float]] = {
        "device": {
            "gigabytes_per_second": floor.bytes_per_microsecond / 1000,
            "teraflops_bf16": floor.operations_per_microsecond / 1e6,
        }
    }
    print(f"{torch.cuda.get_device_name()}: {json.dumps(found['device'])}")
    for tokens in TOKENS:
        rows: dict[str, float] = {}
        for name in ("grouped_mm", "batched_mm"):
            if name == "batched_mm" and tokens > 32:
                continue  # it copies the weights of every slot
            for graphed in (True, False):
                try:
                    rows[f"{name}.{'graph' if graphed else 'plain'}"] = microseconds(
                        stock(name), batches(tokens), graphed
                    )
                except Exception as error:  # a stock implementation that cannot be captured is a finding, not a fault
                    torch.cuda.synchronize()
                    print(f"T={tokens} {name} graphed={graphed}: {type(error).__name__}: {str(error)[:120]}")
        for sub_experts in (SUB_EXPERTS, FINE_SUB_EXPERTS):
            rows |= {f"n{sub_experts}.{name}": time for name, time in layer_times(sub_experts, tokens)}
        rows |= {"floor.full": floor.microseconds(tokens, 1.0), "floor.b500": floor.microseconds(tokens, 0.5)}
        found[f"t{tokens}"] = rows
        if tokens == TOKENS[-1]:
            rows |= {f"kept_half.{name}": kept_half(tokens, how) for name, how in ORDERS.items()}
        print(f"T={tokens}: " + ", ".join(f"{name} {time:.1f}" for name, time in rows.items()), flush=True)
        torch.cuda.empty_cache()
    return found


WIDTHS, DEPTHS, WARPS, STAGES = (32, 64, 128, 256), (32, 64, 128), (4, 8), (3, 4)
REGISTERS, SHARED = 128, 220 * 1024
"""Accumulators of a thread, and bytes of a block, that a candidate may take."""


def candidates(base: Tiling, rows: Sequence[int]) -> list[tuple[str, Tiling]]:
    """Tilings that differ from `base` in their rows and in the tile of one product, with a name each."""
    found = []
    for height, width, depth, warps, stages in itertools.product(rows, WIDTHS, DEPTHS, WARPS, STAGES):
        for product, matrices in (("up", 2), ("down", 1)):
            registers = matrices * height * width / (32 * warps)
            shared = 2 * stages * depth * (height + matrices * width)
            if registers > REGISTERS or shared > SHARED or width * depth < max(512 * warps, 2048 if height > 16 else 0):
                continue
            tile = Tile(width, depth, warps, stages)
            how = replace(base, rows=height, up=tile) if product == "up" else replace(base, rows=height, down=tile)
            found.append((f"{product} {height}x{width}x{depth} w{warps} s{stages}", how))
    return found


def time_tiling(how: Tiling, tokens: int) -> float:
    """Microseconds of all but the choice of cells, at half budget; infinite where the GPU refuses it."""
    weights, inputs = random_layer(SUB_EXPERTS), batches(tokens)
    kept = torch.arange(SUB_EXPERTS, device="cuda") < SUB_EXPERTS // 2
    keep = kept.expand(tokens, TOP_K, SUB_EXPERTS)
    try:
        return microseconds(lambda one: run_kept(*one, keep, weights, how), inputs)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def compile_tiling(how: Tiling) -> None:
    """Run it once, so that the compiled program lies in Triton's cache for the process that measures."""
    kept = torch.ones(1, TOP_K, SUB_EXPERTS, dtype=torch.bool, device="cuda")
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        run_kept(*batch_of_one(), kept, random_layer(SUB_EXPERTS), how)


def sweep(processes: int) -> dict[str, dict[str, float]]:
    """Microseconds of every candidate by number of tokens, the fastest first."""
    found = {}
    for base, rows, sizes in ((DECODE, (16,), (1, 8, 32)), (PREFILL, (64, 128), (1024,))):
        every = candidates(base, rows)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_tiling, [how for _, how in every], chunksize=4))
        for tokens in sizes:
            times = sorted((time_tiling(how, tokens), name) for name, how in every)
            found[f"t{tokens}"] = {name: time for time, name in times}
            for product in ("up", "down"):
                best = [f"{name} {time:.1f}" for time, name in times if name.startswith(product)][:8]
                print(f"T={tokens}: {', '.join(best)}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prism_runtime.kernels.gpu_bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with device and versions")
    parser.add_argument("--sweep", action="store_true", help="time candidate tile sizes instead")
    parser.add_argument("--processes", type=int, default=12, help="that compile candidates (default 12)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this bench measures GPUs; for this CPU see 'make bench-engine'", file=sys.stderr)
        return 1
    if arguments.sweep:
        found = sweep(arguments.processes)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    figures = report()
    if arguments.json:
        arguments.json.write_text(json.dumps(as_figures(figures), indent=1) + "\n")
    return 0


UNITS = {"gigabytes_per_second": "GB/s", "teraflops_bf16": "TFLOP/s", "threshold_realised": "share"}


def as_figures(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One object a figure, as every file of evidence holds them; the device is among the versions."""
    versions = {name: version(name) for name in ("torch", "triton", "transformers")}
    versions["device"] = torch.cuda.get_device_name()
    return [
        {
            "id": f"{group}.{name}",
            "value": round(value, 3),
            "low": None,
            "high": None,
            "unit": UNITS.get(name.rpartition(".")[2], "us"),
            "how": "make evidence-gpu",
            "seeds": [],
            "versions": versions,
        }
        for group, rows in found.items()
        for name, value in rows.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
