"""The load, model and service of llm-d's published benchmark of its SLO-aware autoscaling guide, for simulation.

Source: llm-d/llm-d, guides/workload-autoscaling/slo-aware/benchmark-templates (`BENCHMARK.md`, `scored-config.yml`):
Qwen3-32B on two H100 a replica, constant rates, TTFT 3 s, TPOT 100 ms, 3 to 8 replicas, ready 100 s after the order.
Published: 95.8 % attainment at 5.93 replicas on average, final drain included; 100 % at 8 replicas.

The benchmark's model is dense. What Prism is given here is a model of the same cost whose lowest point is H times as
fast as `full`: a question about the planner ("what would such a knob buy?"), not a claim about that model.
"""

import json
import random
from importlib.resources import files

from prism_api.model import PrismModelSpec
from prism_api.profile import PointProfile, Profile
from prism_api.service import PrismServiceSpec
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.workload import constant, truncated_normal

PHASES = ((330.0, 2.0), (360.0, 4.0), (360.0, 6.0), (360.0, 8.0), (360.0, 10.0), (360.0, 4.0), (300.0, 1.0))
"""(seconds, requests a second)."""
STAGE_INTERVAL_S, PHASE_S = 1.0, 15.0
PROMPT, OUTPUT = truncated_normal(4000, 300, 3500, 4500), truncated_normal(1000, 80, 900, 1100)
LEAST, MOST = 3, 8
START_S = 100.0
TTFT_MS, TPOT_MS = 3000, 100
PROFILE = "h100x2-qwen3-32b"
PUBLISHED_ATTAINMENT, PUBLISHED_REPLICAS = 0.958, 5.93
QUALITY = {500: "0.9934", 625: "0.9975", 750: "0.9991", 875: "0.9997", 1000: "1"}
"""Lower bounds of relative quality by budget as measured on the embedded model (examples/prismmodel.yaml)."""


def play(fleet: Fleet, seed: int) -> None:
    """One episode, from the first request until the pool has drained to its minimum, an hour after the load at most.

    A stage begins when the last request of the one before has ended, as the benchmark's load generator has it
    (inference-perf, `load_generator.py`, `run_stage`): every step of load meets a pool that is empty. The load begins
    at a random phase of the controllers' periods.
    """
    lengths = random.Random(seed)
    fleet.run((), lengths.uniform(0, PHASE_S))
    for seconds, rate in PHASES:
        start_s = fleet.now_s + STAGE_INTERVAL_S
        fleet.run(constant(lengths, start_s, seconds, rate, PROMPT, OUTPUT, "default"), start_s + seconds)
        while fleet.outstanding:
            fleet.run((), fleet.now_s + 1)
    end_s = fleet.now_s + 3600
    while fleet.now_s < end_s and fleet.ordered > LEAST:
        fleet.run((), fleet.now_s + 1)


def shipped_profile(name: str) -> Profile:
    """A profile of this package by name. Raises FileNotFoundError for an unknown one."""
    return Profile.model_validate_json(files(__package__).joinpath("profiles", f"{name}.json").read_text())


def knob(profile: Profile, speed_up: float) -> Profile:
    """`profile`, which has the point `full`, with points of lower budgets: cost falls linearly with the budget, and at
    the lowest point a step is `speed_up` times faster."""
    full = profile.points["full"]
    lowest = min(QUALITY)
    points = {
        name_of(budget): _scaled(full, 1 - (1 - 1 / speed_up) * (1000 - budget) / (1000 - lowest)) for budget in QUALITY
    }
    return profile.model_copy(update={"points": points})


def name_of(budget_permille: int) -> str:
    return "full" if budget_permille == 1000 else f"b{budget_permille}"


def _scaled(point: PointProfile, share: float) -> PointProfile:
    costs = point.model_dump(exclude={"fit_error_permille"})
    return PointProfile(**{field: round(cost * share) for field, cost in costs.items()})


def model() -> PrismModelSpec:
    points = [
        {
            "name": name_of(budget),
            "budgetPermille": budget,
            "policy": "threshold",
            "relativeQuality": quality,
            "relativeQualityLow": quality,
        }
        for budget, quality in QUALITY.items()
    ]
    fields = {
        "source": {"image": {"reference": "registry.example/models/ramp"}},
        "digest": "sha256:" + "0" * 64,
        "servedName": "ramp",
        "operatingPoints": points,
    }
    return PrismModelSpec.model_validate_json(json.dumps(fields))


def service(**changes: object) -> PrismServiceSpec:
    """The benchmark's objectives and bounds; everything else is the default."""
    fields = {
        "modelRef": {"name": "ramp"},
        "classes": [
            {
                "name": "default",
                "objectives": {"ttftMilliseconds": TTFT_MS, "tpotMilliseconds": TPOT_MS},
                "quality": {"minRelativeQuality": "0.95"},
            }
        ],
        "scaling": {"minReplicas": LEAST, "maxReplicas": MOST},
        "pools": [{"name": "main", "accelerator": {"name": "h100x2"}}],
        "runtime": {"image": "registry.example/prism-runtime"},
    }
    return PrismServiceSpec.model_validate_json(json.dumps(fields | changes))
