"""What the parts of the planner are worth: one setting changed at a time, on the ramp and on two traces.

    python -m evidence.planner_ablation        every row into evidence/planner_ablation.json; five minutes of one core

All but the variant is as in `evidence.planner`: the knob makes a step H = 1.2 times faster on the ramp, 1.5 times on
the traces.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence import planner_page as page
from evidence.figures import versions
from evidence.planner import EPISODES, PARETO_SEEDS, RAMP_SEEDS, SPEED_UPS, ramp_episode, ramp_policy, study_of
from prism_api.scaling import ForecastMethod, Reserve
from prism_api.service import BudgetControl
from prism_operator.plan.types import ServicePolicy
from prism_operator.simulate.control import Prism
from prism_operator.simulate.policies import Setting, lengths_of
from prism_operator.simulate.score import Score, score
from prism_operator.simulate.study import interval, play
from prism_operator.simulate.world import World

OUT = Path(__file__).with_name("planner_ablation.json")
COMMAND = "python -m evidence.planner_ablation"
TRACES = ("azure2023_code", "azure2023_conv")
RAMP = "llmd"
REHEARSAL_S = 60.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One change: of the service, or of its pods."""

    said: str
    change: Callable[[ServicePolicy], ServicePolicy] = lambda policy: policy
    governors: bool = False


def _settings(**changes: Any) -> Callable[[ServicePolicy], ServicePolicy]:
    return lambda policy: replace(policy, effective=replace(policy.effective, **changes))


VARIANTS = (
    Variant("every setting at its default"),
    Variant("`budget.control: Off`", lambda policy: replace(policy, budget=BudgetControl.OFF)),
    Variant("`budget.bridgeScaleUp: Disabled`", _settings(bridge_scale_up=False)),
    Variant('`scaling.headroom: "0.10"`, nothing learned', _settings(headroom_learned=False)),
    Variant("`scaling.reserve: Quality`", _settings(reserve=Reserve.QUALITY)),
    Variant("`scaling.reserve: Replicas`", _settings(reserve=Reserve.REPLICAS)),
    Variant("`scaling.forecast.method: Off`", _settings(forecast=ForecastMethod.OFF)),
    Variant(
        f"scale-downs rehearsed for {REHEARSAL_S:.0f} s",
        lambda policy: replace(policy, loop=replace(policy.loop, rehearsal_s=REHEARSAL_S)),
    ),
    Variant("pods with governors", governors=True),
)


def on_ramp(variant: Variant, seed: int) -> Score:
    policy = variant.change(ramp_policy())
    return ramp_episode(policy, Prism(policy), SPEED_UPS[0], World(seed=seed, governors=variant.governors))


def on_trace(variant: Variant, trace: str, seed: int) -> Score:
    study = study_of(next(one for one in EPISODES if one.name == trace))
    study = replace(study, policy=variant.change(study.policy), world=World(governors=variant.governors))
    requests = study.workload(seed)
    setting = Setting(study.policy, study.profile, lengths_of(requests), study.initial)
    return score(play(study, setting, "prism", seed, requests), "prism", seed)


def rows() -> Iterator[Row]:
    """Of every load and variant, as they are taken."""
    for load in (RAMP, *TRACES):
        seeds = RAMP_SEEDS if load == RAMP else PARETO_SEEDS
        for variant in VARIANTS:
            yield row(
                load, variant, [on_ramp(variant, n) if load == RAMP else on_trace(variant, load, n) for n in seeds]
            )


def row(load: str, variant: Variant, runs: Sequence[Score]) -> Row:
    return {
        "load": load,
        "variant": variant.said,
        "attainment": [round(value, 5) for value in interval([one.attainment for one in runs])],
        "replica_hours": [round(value, 4) for value in interval([one.replica_hours for one in runs])],
        "relative_quality": round(statistics.fmean(one.relative_quality or 0.0 for one in runs), 5),
        "switches": round(statistics.fmean(one.switches for one in runs), 1),
        "seeds": [one.seed for one in runs],
    }


def main() -> int:
    argparse.ArgumentParser(prog=COMMAND, description="Re-take what the parts of the planner are worth.").parse_args()
    taken = []
    for one in rows():
        mean, low, high = one["attainment"]
        print(f"{one['load']:15s} {one['variant']:45s} {mean:.4f} ({low:.4f} to {high:.4f})", flush=True)
        taken.append(one)
    lines = ",\n".join(json.dumps(one) for one in taken)
    OUT.write_text(f'{{"how": "{COMMAND}", "versions": {json.dumps(versions())}, "rows": [\n{lines}\n]}}\n')
    return page.main([])


if __name__ == "__main__":
    sys.exit(main())
