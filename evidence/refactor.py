"""Figures of the refactoring engine: fits and measures real models, and writes evidence/refactor.json.

    python -m evidence.refactor                 the embedded model, three calibration seeds
    python -m evidence.refactor --smollm2       SmolLM2 as a mixture of one expert a layer, too: downloads it once
    python -m evidence.refactor --only ID...    these, keeping the others
    python -m evidence.refactor --ablation      evidence/refactor_ablation.json: the recipe with one ingredient changed

Fits are kept in the user's cache folder and taken from there while model, text, settings and code are the same;
--refit makes them again.

Nothing here is typed by hand: a figure that cannot be taken is null and says why. Every cost is counted: gates,
token factors and compensation are part of the budget they are compared at.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from evidence import figures
from evidence import refactor_ablation as ablation
from evidence import refactor_page as page
from evidence.figures import ROOT, NotTaken
from evidence.refactor_bytes import BATCHES, SELECTIONS, ByteFigures
from evidence.refactor_drift import ROTATIONS, DriftFigures
from evidence.refactor_fits import LADDER, PAPER_SUB_EXPERTS, Fits, candidates_of, costs, perplexity, run_of, small_moe
from evidence.refactor_smollm2 import SmolLM2Figures
from prism_runtime.refactor.paper import Schedule
from prism_runtime.refactor.points import Candidates, PointCount, count_points, kl_at

OUT = Path(__file__).with_name("refactor.json")
COMMAND = "python -m evidence.refactor"
LAYER_COMMAND = "python -m prism_runtime.refactor.bench --layer-only"
GROWTH_COMMAND = "python -m prism_runtime.refactor.bench --growth-only"
GROWTH = {
    "experts": "twice the experts",
    "neurons": "twice the neurons",
    "rows": "twice the rows",
    "proposals": "four times the proposals",
}
"""What is made larger, by the end of the figure's id, and the bench's name for it."""
SEEDS = (0, 1, 2)
SCHEDULES: tuple[Schedule, ...] = ("published", "thawed")
FINE, COARSE = 16, 8
"""Sub-experts of the embedded model's experts: of 8 neurons, the best granularity, and of 16.

Counts of points leave `full` out, which every method has.
"""


Measured = dict[str, float]
"""One measurement of the bench."""


class Models:
    """Loaded when a figure needs them."""

    def __init__(self, console: Console, *, smollm2: bool, refit: bool = False) -> None:
        self._console, self._with_smollm2, self._refit = console, smollm2, refit

    @cached_property
    def small(self) -> Fits:
        return small_moe(ROOT / "examples" / "model", self._console, refit=self._refit)

    @cached_property
    def bytes(self) -> ByteFigures:
        return ByteFigures(self.small, FINE)

    @cached_property
    def drift(self) -> DriftFigures:
        return DriftFigures(self.small, FINE)

    @cached_property
    def smollm2(self) -> SmolLM2Figures:
        if not self._with_smollm2:
            raise NotTaken("taken only with --smollm2: it downloads the model and takes hours on two cores")
        from examples.smollm2.fetch import cache_folder

        argv = [sys.executable, "-m", "examples.smollm2"]
        run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise NotTaken(f"'{' '.join(argv)}' failed (exit {run.returncode}): {run.stderr[-300:]}")
        folders = [path.parent for path in cache_folder().rglob("config.json") if _is_mixture(path)]
        if not folders:
            raise NotTaken(f"'{cache_folder()}' has no Mixtral checkpoint after python -m examples.smollm2")
        texts = ROOT / "examples" / "model"
        return SmolLM2Figures(folders[0], texts, self._console, refit=self._refit)

    @cached_property
    def layer(self) -> Measured:
        """The bench's measurement of a layer of OLMoE's shape: seconds of the wall, and of the processors."""
        return _bench("--layer-only")["layer"]

    @cached_property
    def growth(self) -> dict[str, Measured]:
        """The bench's measurements of a few experts of that shape, and of the same with one quantity changed."""
        return _bench("--growth-only")


def _bench(part: str) -> dict[str, Measured]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "bench.json"
        argv = [sys.executable, "-m", "prism_runtime.refactor.bench", part, "--json", str(report)]
        run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise NotTaken(f"'{' '.join(argv[1:])}' failed (exit {run.returncode}): {run.stderr[-300:]}")
        return dict(json.loads(report.read_text())["measurements"])


Values = Sequence[float | None]


def _figure(
    unit: str, take: Callable[[Models], Values], seeds: Sequence[int] = SEEDS, how: str = COMMAND
) -> figures.Collector[Models]:
    return figures.Collector(unit, how, take, seeds)


def _over_top_k(permille: int, sub_experts: int, models: Models) -> Values:
    place = (750, 500, 250).index(permille)
    top = float(models.small.top_k_at(permille).kl.mean())
    return [top / float(models.small.prism(seed, sub_experts)[place].kl.mean()) for seed in SEEDS]


def _prism(models: Models) -> Values:
    return [float(models.small.prism(seed, FINE)[1].kl.mean()) for seed in SEEDS]


def _oracle(models: Models) -> Values:
    return [float(models.small.oracle(seed, FINE).kl.mean()) for seed in SEEDS]


def _over_paper(models: Models) -> Values:
    """The better of both schedules, interpolated to the recipe's realised cost."""
    values: list[float | None] = []
    for seed in SEEDS:
        ours = models.small.prism(seed, FINE)[1]
        found = []
        for schedule in SCHEDULES:
            rows = models.small.paper(seed, schedule)
            at = kl_at(costs(rows), np.array([row.kl.mean() for row in rows]), ours.realised)
            found += [] if at is None else [float(at)]
        values.append(min(found) / float(ours.kl.mean()) if found else None)
    return values


def _points_prism(models: Models) -> Values:
    small = models.small
    return [_stable(count_points(_candidates(small), small.domains, small.runs(SEEDS, FINE)))]


def _rises(models: Models) -> Values:
    """Of seed 0's candidates on the evaluation text, before any fit makes them monotone."""
    return [float(count_points(_candidates(models.small), models.small.domains).rises)]


def _candidates(small: Fits) -> Candidates:
    return candidates_of(small.prism(SEEDS[0], FINE, LADDER), [permille / 1000 for permille in LADDER])


def _points_top_k(models: Models) -> Values:
    small = models.small
    best = 0
    for renormalised, rows in enumerate(small.top_k_rows):
        nominal = [kept / small.top_k for kept in range(1, small.top_k)]
        runs = small.top_k_runs(bool(renormalised))
        best = max(best, _stable(count_points(candidates_of(rows, nominal), small.domains, runs)))
    return [best]


def _points_paper(models: Models) -> Values:
    small, best = models.small, 0
    for schedule in SCHEDULES:
        rows = small.paper(SEEDS[0], schedule)
        cells = small.top_k * PAPER_SUB_EXPERTS
        candidates = candidates_of(rows, [active / cells for active in range(cells // 4, cells)])
        runs = [run_of(small.paper(seed, schedule)) for seed in SEEDS]
        best = max(best, _stable(count_points(candidates, small.domains, runs)))
    return [best]


def _stable(count: PointCount) -> int:
    if count.stable is None:
        raise NotTaken("stability was not judged: there were too few runs")
    return len(count.stable)


def _bytes(batch: int, models: Models) -> Values:
    return models.bytes.best(batch, SEEDS)


def _bytes_of(batch: int, selection: str, models: Models) -> Values:
    return models.bytes.over(selection, batch, SEEDS)


def _bytes_share(batch: int, models: Models) -> Values:
    return [models.bytes.top_k_share(batch, SEEDS[0])]


def _drift(guarded: bool, models: Models) -> Values:
    return models.drift.errors(ROTATIONS, guarded=guarded)


def _layer_minutes(models: Models) -> Values:
    return [(models.layer["partition_seconds"] + models.layer["gate_seconds"]) / 60]


def _layer_cpu_minutes(models: Models) -> Values:
    return [models.layer["cpu_seconds"] / 60]


def _growth(changed: str, models: Models) -> Values:
    return [models.growth[changed]["cpu_seconds"] / models.growth["few experts"]["cpu_seconds"]]


def _smollm2_full(models: Models) -> Values:
    return [models.smollm2.full]


def _smollm2(permille: int, models: Models) -> Values:
    return [perplexity(models.smollm2.recipe(permille))]


def _smollm2_bare(permille: int, models: Models) -> Values:
    return [perplexity(models.smollm2.bare(permille))]


def _smollm2_realised(permille: int, models: Models) -> Values:
    return [1000 * models.smollm2.recipe(permille).realised]


def _smollm2_neurons(permille: int, models: Models) -> Values:
    return [perplexity(models.smollm2.neurons(permille))]


def _smollm2_mix(permille: int, models: Models) -> Values:
    return [perplexity(models.smollm2.neurons_of_slices(permille))]


def _smollm2_mix_realised(permille: int, models: Models) -> Values:
    return [1000 * models.smollm2.neurons_of_slices(permille).realised]


def _of_smollm2(take: Callable[[Models], Values], unit: str = "perplexity") -> figures.Collector[Models]:
    return _figure(unit, take, (0,), f"{COMMAND} --smollm2")


COLLECTORS = {
    **{
        f"kl.topk_over_prism.b{permille}": _figure("ratio", partial(_over_top_k, permille, FINE))
        for permille in (750, 500, 250)
    },
    "kl.topk_over_prism.b500.d16": _figure("ratio", partial(_over_top_k, 500, COARSE)),
    "kl.paper_over_prism.b500": _figure("ratio", _over_paper),
    "kl.prism.b500": _figure("nats a token", _prism),
    "kl.oracle.b500": _figure("nats a token", _oracle),
    "points.prism": _figure("points", _points_prism),
    "points.prism.candidates": _figure("points", lambda _: [len(LADDER)], seeds=()),
    "points.prism.rises": _figure("points", _rises, (0,)),
    "points.paper": _figure("points", _points_paper),
    "points.topk": _figure("points", _points_top_k, seeds=()),
    "layer.olmoe_minutes": _figure("min", _layer_minutes, (0,), LAYER_COMMAND),
    "layer.olmoe_cpu_minutes": _figure("CPU min", _layer_cpu_minutes, (0,), LAYER_COMMAND),
    **{
        f"layer.growth.{name}": _figure("ratio", partial(_growth, changed), (0,), GROWTH_COMMAND)
        for name, changed in GROWTH.items()
    },
    **{f"bytes.b500.batch{batch}.kl_topk_over_prism": _figure("ratio", partial(_bytes, batch)) for batch in BATCHES},
    **{
        f"bytes.b500.batch{batch}.kl_topk_over.{selection}": _figure("ratio", partial(_bytes_of, batch, selection))
        for batch in BATCHES
        for selection in SELECTIONS
    },
    **{
        f"bytes.b500.batch{batch}.topk_share": _figure("share", partial(_bytes_share, batch), seeds=())
        for batch in BATCHES
    },
    "drift.realised_error_permille": _figure("permille", partial(_drift, True), ROTATIONS),
    "drift.unguarded_error_permille": _figure("permille", partial(_drift, False), ROTATIONS),
    "smollm2.ppl.full": _of_smollm2(_smollm2_full),
    **{f"smollm2.ppl.b{permille}": _of_smollm2(partial(_smollm2, permille)) for permille in (500, 750)},
    **{
        f"smollm2.realised.b{permille}": _of_smollm2(partial(_smollm2_realised, permille), "permille")
        for permille in (500, 750)
    },
    "smollm2.ppl.neuron.b750": _of_smollm2(partial(_smollm2_neurons, 750)),
    **{f"smollm2.ppl.mix.b{permille}": _of_smollm2(partial(_smollm2_mix, permille)) for permille in (500, 750)},
    **{
        f"smollm2.realised.mix.b{permille}": _of_smollm2(partial(_smollm2_mix_realised, permille), "permille")
        for permille in (500, 750)
    },
    **{f"smollm2.ppl.bare.b{permille}": _of_smollm2(partial(_smollm2_bare, permille)) for permille in (500, 750)},
}


NEVER_TAKEN = "not taken yet; run: make evidence-refactor"


collect = partial(figures.collect, COLLECTORS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.refactor", description="Re-take the published figures.")
    ids = ", ".join([*COLLECTORS, *ablation.VARIANTS])
    parser.add_argument("--only", nargs="+", metavar="ID", help=f"re-take these alone: {ids}")
    parser.add_argument("--smollm2", action="store_true", help="take SmolLM2's figures too: hours on two cores")
    parser.add_argument("--ablation", action="store_true", help="take the ablation's rows instead: two hours of a core")
    parser.add_argument("--refit", action="store_true", help="use no fit that the cache folder holds")
    arguments = parser.parse_args()
    known = ablation.VARIANTS if arguments.ablation else COLLECTORS
    if unknown := sorted(set(arguments.only or ()) - set(known)):
        parser.error(f"--only: there is no {', '.join(unknown)}; choose from {', '.join(known)}")
    console = Console(stderr=True)
    models = Models(console, smollm2=arguments.smollm2, refit=arguments.refit)
    torch.set_num_threads(1)
    names = [name for name in known if name in (arguments.only or known)]
    if arguments.ablation:
        ablation.run(models.small, names, SEEDS, partial(console.print, highlight=False))
    else:
        keep = partial(_needs_smollm2, without=not arguments.smollm2)
        figures.take_into(OUT, COLLECTORS, names, models, partial(console.print, highlight=False), keep)
        figures.fill_in(OUT, COLLECTORS, NEVER_TAKEN)
    return page.main([])


def _needs_smollm2(name: str, *, without: bool) -> bool:
    return without and name.startswith("smollm2")


def _is_mixture(config: Path) -> bool:
    return json.loads(config.read_text()).get("model_type") == "mixtral"


if __name__ == "__main__":
    sys.exit(main())
