"""Quality at equal weight bytes: what decode steps of a batch read, by selection, against plain top-k.

The comparison at half budget: plain top-K/2 is run in steps of a batch's tokens, and the share of the full model's
weight bytes that it reads there is the share at which every selection of ours is compared with it. Top-K/2 and its
renormalised form read the same, and the better of both counts. A selection of ours reads that share at some budget of
its own; its KL there is taken between two measured budgets, linear in log KL over bytes, gate and compensation weights
counted as read.

token   every token chooses for itself, as the run time's threshold points do; a step reads the union
step    one choice for the whole step, by the sum of its tokens' scores; the run time does not serve it
prefix  the first sub-experts of every expert, whatever the token
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from evidence.refactor_fits import Fits, settings_of
from prism_runtime.refactor.baselines import Prefix, TopK
from prism_runtime.refactor.bytes import StepSubject, Touching, best_selection, interleave, measure_touching
from prism_runtime.refactor.subjects import Cut, always, elastic_step_subjects

BATCHES = (8, 32)
SELECTIONS = ("token", "step", "prefix")
SEQUENCES = 96
"""Whole batches of 32, every domain in them."""
TOKEN_BUDGETS = (400, 500, 600)
STEP_ONLY_BUDGETS = (750, 900)
"""Whose compensation the step selections take: in bytes they spend more than in neurons."""
STEP_BUDGETS = {8: (0.6, 0.65, 0.7), 32: (0.9, 0.94, 0.97)}
PREFIXES = {8: (11.0, 12.0), 32: (15.0, 15.5)}
"""Of 16 sub-experts; 15.5 are 16 in the first half of the layers and 15 in the others. All of these lie on both sides
of what top-2 of 4 reads; else a selection has no value."""
PLAIN = "top-k"


class ByteFigures:
    """Ratios of one model's recipe of `sub_experts`, by seed and batch."""

    def __init__(self, fits: Fits, sub_experts: int) -> None:
        self._fits, self._sub_experts = fits, sub_experts

    def top_k_share(self, batch: int, seed: int) -> float:
        """Of the full model's weight bytes, what plain top-K/2 reads."""
        return self._better_top_k(batch, seed).share

    def over(self, selection: str, batch: int, seeds: Sequence[int]) -> list[float | None]:
        """KL of the better top-K/2 divided by the selection's at its bytes, one value a seed."""
        return [self._ratios(batch, seed).get(selection) for seed in seeds]

    def best(self, batch: int, seeds: Sequence[int]) -> list[float | None]:
        """The same of the selection that is best on average; the same one for all seeds."""
        measured = [[each for each in self.over(name, batch, seeds) if each is not None] for name in SELECTIONS]
        whole = [values for values in measured if len(values) == len(seeds)]
        return list(max(whole, key=sum)) if whole else [None for _ in seeds]

    def _ratios(self, batch: int, seed: int) -> dict[str, float]:
        plain = self._better_top_k(batch, seed)
        found = best_selection(self._measured(batch, seed), plain.share)
        return {name: float(plain.kl.mean() / kl.mean()) for name, kl in found.items() if name in SELECTIONS}

    def _better_top_k(self, batch: int, seed: int) -> Touching:
        plain = [each for each in self._measured(batch, seed) if each.selection == PLAIN]
        return min(plain, key=lambda each: float(each.kl.mean()))

    @cache  # noqa: B019 - one instance a model, as long as the program runs
    def _measured(self, batch: int, seed: int) -> list[Touching]:
        fits, width = self._fits, self._sub_experts
        cut = Cut(len(fits.masked.experts), fits.shape[0], fits.neurons, width, fits.top_k)
        recipe = fits.recipe(settings_of(seed, width, (*TOKEN_BUDGETS, *STEP_ONLY_BUDGETS)))
        methods = {permille / 1000: recipe.method(permille) for permille in recipe.points}
        elastic = elastic_step_subjects(methods, cut, fits.hidden, STEP_BUDGETS[batch])
        alone = {methods[permille / 1000].name for permille in STEP_ONLY_BUDGETS}
        subjects = [each for each in elastic if not (each.selection == "token" and each.method(batch).name in alone)]
        for count in PREFIXES[batch]:
            method = Prefix(f"prefix {count:g}", prefix_counts(count, cut.layers, cut.top_k), width)
            subjects.append(StepSubject("prefix", always(method)))
        for renormalised in (False, True):
            subjects.append(StepSubject(PLAIN, always(TopK(cut.top_k // 2, renormalised))))
        return measure_touching(fits.masked, interleave(fits.evaluation)[:SEQUENCES], subjects, batch)


def prefix_counts(mean: float, layers: int, top_k: int) -> Tensor:
    """int64 [layers, top_k]: sub-experts of each expert, whole numbers of that mean over layers; larger ones first."""
    wanted = round(mean * layers)
    counts = torch.full((layers,), wanted // layers)
    counts[: wanted % layers] += 1
    return counts[:, None].expand(layers, top_k).contiguous()
