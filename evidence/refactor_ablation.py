"""What each ingredient of the recipe is worth: the recipe with one changed, and the corners of the product.

Every row is KL to the full model at half budget on the embedded model, all costs counted, for each calibration seed.
Rows with an oracle gate choose by true norms at no cost and without compensation: bounds, not methods.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evidence.figures import measured
from evidence.refactor_fits import Fits, costs, settings_of
from prism_runtime.refactor.evaluate import Measurement
from prism_runtime.refactor.fit import RecipeSettings
from prism_runtime.refactor.points import kl_at

OUT = Path(__file__).with_name("refactor_ablation.json")
COMMAND = "python -m evidence.refactor --ablation"
BUDGET = 500
RECIPE = settings_of(0, 16, (BUDGET,))
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe without its seed; `oracle` puts true norms in place of its gate."""

    settings: RecipeSettings
    oracle: bool = False

    def ingredients(self) -> Json:
        """What a reader needs to tell rows apart."""
        settings = self.settings
        searched = settings.proposals != 0
        token = "ridge, token factor" if settings.token_factor else "ridge"
        return {
            "partition": ("prism, two passes" if settings.centred else "prism, one pass")
            if searched
            else settings.starts[0],
            "gate": "oracle" if self.oracle else token + (", adaptive" if settings.kappa is not None else ""),
            "metric": settings.metric,
            "compensation": "none" if self.oracle else settings.compensation or "none",
            "allocation": settings.allocation,
            "sub_experts": settings.sub_experts,
        }


def _changed(**settings: Any) -> Variant:
    return Variant(replace(RECIPE, **settings))


def _cut(start: str, **settings: Any) -> Variant:
    """A partition that is not searched."""
    return _changed(starts=(start,), proposals=0, centred=False, **settings)


def _oracle(variant: Variant) -> Variant:
    return replace(variant, oracle=True)


VARIANTS: dict[str, Variant] = {
    "recipe": Variant(RECIPE),
    "compensation.none": _changed(compensation=None),
    "compensation.dense": _changed(compensation="dense"),
    "gate.oracle": _oracle(_changed()),
    "partition.random": _cut("random"),
    "partition.contiguous": _cut("contiguous"),
    "partition.sorted": _cut("sorted"),
    "partition.one-pass": _changed(centred=False),
    "metric.identity": _changed(metric="identity"),
    "granularity.8": _changed(sub_experts=8),
    "granularity.4": _changed(sub_experts=4),
    "gate.no-token-factor": _changed(token_factor=False),
    "gate.not-adaptive": _changed(kappa=None),
    "allocation.layer": _changed(allocation="layer"),
    "corner.random.no-compensation": _cut("random", compensation=None),
    "corner.sorted.no-compensation": _cut("sorted", compensation=None),
    "corner.random.oracle": _oracle(_cut("random")),
    "corner.sorted.oracle": _oracle(_cut("sorted")),
    "corner.granularity.8.oracle": _oracle(_changed(sub_experts=8)),
    "corner.granularity.4.oracle": _oracle(_changed(sub_experts=4)),
    "corner.sorted.identity.bare": _cut(
        "sorted", metric="identity", compensation=None, token_factor=False, sub_experts=8
    ),
}


@dataclass(frozen=True, slots=True)
class Taken:
    """One variant with one seed: KL in nats, realised budget, and how many times the better plain top-k's KL is
    larger at that budget."""

    kl: float
    realised: float
    top_k_over: float


def take(name: str, seed: int, fits: Fits) -> Taken:
    """Measure one variant; fits that the cache has are not made again."""
    variant = VARIANTS[name]
    settings = replace(variant.settings, seed=seed)
    row = fits.oracle_on(settings) if variant.oracle else fits.recipe_rows(settings)[0]
    kl = float(row.kl.mean())
    return Taken(kl, row.realised, _top_k_at(fits.top_k_rows, row.realised) / kl)


def _top_k_at(top_k: Sequence[Sequence[Measurement]], realised: float) -> float:
    """KL of the better normalisation at a budget, log-linear between whole numbers of experts."""
    means = [kl_at(costs(rows), np.array([row.kl.mean() for row in rows]), realised) for rows in top_k]
    return min(float(each) for each in means if each is not None)


def row_of(name: str, taken: Sequence[Taken], seeds: Sequence[int]) -> Json:
    """What is published of a variant: a figure with what it is made of."""
    figure = measured(f"ablation.{name}", [1000 * each.kl for each in taken], "millinats a token", COMMAND, seeds)
    over = measured("", [each.top_k_over for each in taken], "ratio", COMMAND, seeds)
    return {key: value for key, value in asdict(figure).items() if key != "why"} | {
        "ingredients": VARIANTS[name].ingredients(),
        "realised": round(float(np.mean([each.realised for each in taken])), 4),
        "topk_over": {"value": over.value, "low": over.low, "high": over.high},
    }


def merge_row(path: Path, row: Json) -> None:
    """Write one row and keep the others, in the order of the variants; a row of an unknown variant is dropped."""
    rows = {each["id"]: each for each in json.loads(path.read_text())} if path.exists() else {}
    rows[row["id"]] = row
    ids = [f"ablation.{name}" for name in VARIANTS]
    path.write_text(json.dumps([rows[name] for name in ids if name in rows], indent=1) + "\n")


def run(fits: Fits, names: Sequence[str], seeds: Sequence[int], say: Any, path: Path = OUT) -> None:
    """Take the variants, seed by seed, so that an interruption leaves every row with the seeds that are done."""
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for index, seed in enumerate(seeds):
        for name in names:
            taken[name].append(take(name, seed, fits))
            merge_row(path, row_of(name, taken[name], seeds[: index + 1]))
            found = taken[name][-1]
            say(f"ablation.{name}, seed {seed}: {found.kl:.5f} at {found.realised:.4f}, {found.top_k_over:.2f}x")
