"""How long one MoE layer takes, from rows and weights to a partition and gates, and what that depends on.

python -m prism_runtime.refactor.bench [--json FILE]

Weights and activations are synthetic: inputs of a few heavy-tailed factors, so that neurons fire together and a search
has something to find. Times are those of a real layer of the shape; what the objective gains is not.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from prism_runtime import native
from prism_runtime.refactor.gates import fit_gate
from prism_runtime.refactor.layer_search import (
    ExpertSearch,
    PartitionSettings,
    energy_limits,
    partition_layer,
    starting_energies,
)
from prism_runtime.refactor.masked import Experts, LayerRows
from prism_runtime.refactor.swap import SOURCE

FACTORS = 96


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one MoE layer and its calibration. tokens: an expert's, on average. OLMoE-1B-7B is the default."""

    experts: int = 64
    neurons: int = 1_024
    hidden: int = 2_048
    routed: int = 8
    tokens: int = 4_096
    sub_experts: int = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """Objectives: sums over experts of the first pass, at its start and at its end.

    partition_seconds, gate_seconds  wall; the partition's are both passes
    cpu_seconds  of both, over all threads: on a machine that does nothing else, wall times the threads
    """

    shape: Shape
    proposals: int
    rows: int
    threads: int
    partition_seconds: float
    gate_seconds: float
    cpu_seconds: float
    start_objective: float
    objective: float


def synthetic(shape: Shape, seed: int = 0) -> tuple[Experts, LayerRows, Tensor]:
    """Experts, rows and the layer's metric."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    tokens = max(1, shape.experts * shape.tokens // shape.routed)
    strength = normal(tokens, FACTORS) * normal(tokens, FACTORS).square()
    x = strength @ normal(FACTORS, shape.hidden) / FACTORS**0.5 + 0.3 * normal(tokens, shape.hidden)
    rms = 0.5 + normal(tokens).abs()
    scores = normal(tokens, shape.experts)
    router_weights, expert_ids = scores.softmax(-1).topk(shape.routed)
    weights = [torch.empty(shape.experts, shape.neurons, shape.hidden) for _ in range(3)]
    for weight in weights:
        weight.normal_(generator=random).mul_(shape.hidden**-0.5)
    root = normal(shape.hidden, FACTORS) / FACTORS**0.5
    metric = root @ root.T + 0.1 * torch.eye(shape.hidden)
    gate, up, down = weights
    experts = Experts(gate, up, down, biases=None, activation=lambda gate, up: silu(gate) * up)
    return experts, LayerRows(x, rms, expert_ids, router_weights), metric


def measure(shape: Shape, settings: PartitionSettings, threads: int) -> Measurement:
    """Both passes over one layer, the second from the first and with means taken out, and the gates."""
    experts, rows, metric = synthetic(shape)
    searches: list[ExpertSearch] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    limits = energy_limits([starting_energies(experts, rows, metric, settings)])
    perm = partition_layer(experts, rows, metric, settings, limits=limits, threads=threads, on_expert=searches.append)
    means = torch.full((shape.experts, shape.neurons), 0.01)
    perm = partition_layer(experts, rows, metric, settings, limits=limits, means=means, start=perm, threads=threads)
    partitioned = time.perf_counter()
    torch.set_num_threads(threads)
    fit_gate(experts.permuted(perm), rows, metric, shape.sub_experts, token=None, kappa=None)
    finished, cpu_finished = time.perf_counter(), time.process_time()
    return Measurement(
        shape=shape,
        proposals=settings.proposals_of(shape.neurons),
        rows=settings.rows,
        threads=threads,
        partition_seconds=round(partitioned - began, 2),
        gate_seconds=round(finished - partitioned, 2),
        cpu_seconds=round(cpu_finished - cpu_began, 2),
        start_objective=round(sum(search.start_objective for search in searches), 4),
        objective=round(sum(search.objective for search in searches), 4),
    )


def variants(shape: Shape, settings: PartitionSettings) -> list[tuple[str, Shape, PartitionSettings]]:
    """One quantity at a time around a few experts of the shape: what the whole layer's time grows with."""
    proposals = settings.proposals_of(shape.neurons)
    few = replace(shape, experts=max(2, shape.experts // 16), routed=2)
    return [
        ("few experts", few, settings),
        ("twice the experts", replace(few, experts=2 * few.experts), settings),
        ("half the neurons", replace(few, neurons=few.neurons // 2), settings),
        ("twice the neurons", replace(few, neurons=2 * few.neurons), settings),
        ("half the sub-experts", replace(few, sub_experts=few.sub_experts // 2), settings),
        ("a quarter of the rows", few, replace(settings, rows=settings.rows // 4)),
        ("twice the rows", few, replace(settings, rows=2 * settings.rows)),
        ("a quarter of the proposals", few, replace(settings, proposals=proposals // 4)),
        ("four times the proposals", few, replace(settings, proposals=4 * proposals)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_runtime.refactor.bench", description=__doc__)
    defaults = Shape()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--proposals", type=int, help="of an expert and pass; by default as a partition takes them")
    parser.add_argument("--rows", type=int, default=PartitionSettings(2).rows)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--layer-only", action="store_true", help="leave out how the time grows")
    parts.add_argument("--growth-only", action="store_true", help="leave out the whole layer")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    shape = Shape(**{name: getattr(options, name) for name in asdict(defaults)})

    report: dict[str, object] = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "compiled": native.library(SOURCE) is not None,
    }
    measurements: dict[str, object] = {}
    settings = PartitionSettings(shape.sub_experts, proposals=options.proposals, rows=options.rows)
    layer = [] if options.growth_only else [("layer", shape, settings)]
    growth = [] if options.layer_only else variants(shape, settings)
    for name, wanted, chosen in [*layer, *growth]:
        found = measure(wanted, replace(chosen, sub_experts=wanted.sub_experts), options.threads)
        measurements[name] = asdict(found)
        gain = 100 * (1 - found.objective / found.start_objective)
        print(
            f"{name:28} partition {found.partition_seconds:7.1f} s, gates {found.gate_seconds:6.1f} s, "
            f"cpu {found.cpu_seconds:7.1f} s; objective -{gain:.1f} %",
            flush=True,
        )
    report["measurements"] = measurements
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
