"""Fits and measurements that several figures of the refactoring engine share, each made at most once."""

import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.artifact import open_artifact
from prism_runtime.refactor.baselines import OracleGate, TopK, calibrate_threshold, contiguous_groups
from prism_runtime.refactor.bootstrap import Floats
from prism_runtime.refactor.evaluate import Measurement, Subject, evaluate_methods
from prism_runtime.refactor.fit import FittedRecipe, RecipeSettings, fit_recipe
from prism_runtime.refactor.masked import MaskedModel, capture
from prism_runtime.refactor.method import Method
from prism_runtime.refactor.paper import PaperMethod, PaperSettings, Schedule, fit_paper
from prism_runtime.refactor.points import Candidates, Run
from prism_runtime.refactor.text import TokenSequence, cut_sequences, read_documents

LENGTH = 256
BUDGETS = (750, 500, 250)
LADDER = tuple(range(250, 1000, 50))
PAPER_SUB_EXPERTS = 4
RANK = 8


class Fits:
    """One model, its calibration text cut by seed, and what was fitted and measured on it.

    held        sequences of a domain, at the end of the calibration text, that thresholds are chosen on
    evaluation  most sequences of a domain of the evaluation text
    half        fit each seed on a random half of the rest, or all seeds on all of it
    """

    def __init__(
        self, folder: Path, texts: Path, console: Console, *, held: int, evaluation: int, fit: int | None, half: bool
    ) -> None:
        self._console, self._half = console, half
        self.model, tokenizer = load_pretrained(folder)
        self.masked = MaskedModel(self.model)
        experts, self.neurons, self.hidden = self.masked.experts[0].gate.shape
        self.shape = (experts, self.neurons)
        self.top_k = int(self.model.config.get_text_config().num_experts_per_tok)
        calibration = cut_sequences(read_documents(texts / "calibration.jsonl.gz"), tokenizer, LENGTH)
        self.held = [each for domain in _by_domain(calibration) for each in domain[-held:]]
        self._pool = [each for domain in _by_domain(calibration) for each in domain[:-held][:fit]]
        self.evaluation = cut_sequences(read_documents(texts / "evaluation.jsonl.gz"), tokenizer, LENGTH, evaluation)
        self.domains = [each.domain for each in self.evaluation]

    def fit_text(self, seed: int) -> list[TokenSequence]:
        if not self._half:
            return self._pool
        drawn = torch.randperm(len(self._pool), generator=torch.Generator().manual_seed(seed))
        return [self._pool[index] for index in sorted(drawn[: len(drawn) // 2].tolist())]

    @cache  # noqa: B019 - one instance a model, as long as the program runs
    def recipe(self, seed: int, sub_experts: int, budgets: tuple[int, ...], rank: int) -> FittedRecipe:
        settings = RecipeSettings(sub_experts=sub_experts, budgets_permille=budgets, rank=rank, seed=seed)
        return fit_recipe(
            self.model,
            self.fit_text(seed),
            self.held,
            settings,
            lambda step: self._console.print(f"seed {seed}, {sub_experts} sub-experts: {step}", highlight=False),
        )

    @cache  # noqa: B019
    def prism(
        self, seed: int, sub_experts: int, budgets: tuple[int, ...] = BUDGETS, rank: int = 8
    ) -> list[Measurement]:
        """One row a budget, in their order."""
        return self._prism_on(self.evaluation, seed, sub_experts, budgets, rank)

    @cached_property
    def top_k_rows(self) -> list[list[Measurement]]:
        """For either normalisation, whole experts from one to all but one."""
        self._unpermute()
        return [
            self._measure(self.evaluation, [TopK(kept, renormalised) for kept in range(1, self.top_k)])
            for renormalised in (False, True)
        ]

    def top_k_at(self, permille: int) -> Measurement:
        """The better normalisation."""
        kept = permille * self.top_k // 1000
        return min((rows[kept - 1] for rows in self.top_k_rows), key=lambda row: float(row.kl.mean()))

    @cached_property
    def full(self) -> Measurement:
        self._unpermute()
        return self._measure(self.evaluation, [TopK(self.top_k)])[0]

    @cache  # noqa: B019
    def oracle(self, seed: int, sub_experts: int) -> Measurement:
        """True norms in the recipe's metric on its partition, at half the sub-experts, without any cost."""
        recipe = self.recipe(seed, sub_experts, BUDGETS, RANK)
        self.masked.permute(recipe.perms)
        groups = contiguous_groups(self.shape, len(recipe.perms), sub_experts)
        gate = OracleGate("oracle", groups, sub_experts, recipe.metric)
        calibrate_threshold(self.masked, gate, self.held, 0.5)
        return self._measure(self.evaluation, [gate])[0]

    @cache  # noqa: B019
    def paper(self, seed: int, schedule: Schedule) -> list[Measurement]:
        """The published method, one row for each number of active sub-experts from a quarter up."""
        self._unpermute()
        rows = capture(self.model, self.fit_text(seed))
        settings = PaperSettings(PAPER_SUB_EXPERTS, schedule=schedule, seed=seed)
        layers = [
            fit_paper(experts, layer_rows, settings, layer=layer)
            for layer, (experts, layer_rows) in enumerate(zip(self.masked.experts, rows, strict=True))
        ]
        self.masked.permute([layer.perm for layer in layers])
        cells = self.top_k * PAPER_SUB_EXPERTS
        return self._measure(self.evaluation, [PaperMethod(layers, k, self.top_k) for k in range(cells // 4, cells)])

    def runs(self, seeds: Sequence[int], sub_experts: int) -> list[Run]:
        """The ladder's candidates for every seed, on the evaluation text and on the held-out calibration text."""
        rows = [self.prism(seed, sub_experts, LADDER) for seed in seeds]
        rows += [self._prism_on(self.held, seed, sub_experts, LADDER, RANK) for seed in seeds]
        return [run_of(each) for each in rows]

    def top_k_runs(self, renormalised: bool) -> list[Run]:
        """Top-k has no seed: both texts, and the evaluation text's halves."""
        self._unpermute()
        methods = [TopK(kept, renormalised) for kept in range(1, self.top_k)]
        texts = (self.evaluation, self.held, self.evaluation[::2], self.evaluation[1::2])
        return [run_of(self._measure(text, methods)) for text in texts]

    def _prism_on(
        self, text: Sequence[TokenSequence], seed: int, sub_experts: int, budgets: tuple[int, ...], rank: int
    ) -> list[Measurement]:
        recipe = self.recipe(seed, sub_experts, budgets, rank)
        self.masked.permute(recipe.perms)
        return self._measure(text, [recipe.method(permille) for permille in budgets])

    def _unpermute(self) -> None:
        order = torch.arange(self.neurons).expand(*self.shape)
        self.masked.permute([order for _ in self.masked.experts])

    def _measure(self, text: Sequence[TokenSequence], methods: Sequence[Method]) -> list[Measurement]:
        return evaluate_methods(self.masked, text, [Subject(method.name, 0.0, method) for method in methods])


def small_moe(root: Path, console: Console) -> Fits:
    """The embedded model, from the inverse of its artifact's permutation."""
    artifact = open_artifact(root / "artifact")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        for path in artifact.directory.iterdir():
            if not path.name.startswith(("model", "prism_")):
                (source / path.name).write_bytes(path.read_bytes())
        artifact.restore_source(source)
        return Fits(source, root, console, held=24, evaluation=24, fit=None, half=True)


def candidates_of(rows: Sequence[Measurement], nominal: Sequence[float]) -> Candidates:
    return Candidates(np.array(nominal), costs(rows), np.stack([row.kl for row in rows]))


def run_of(rows: Sequence[Measurement]) -> Run:
    return Run(costs(rows), np.array([row.kl.mean() for row in rows]))


def costs(rows: Sequence[Measurement]) -> Floats:
    return np.array([row.realised for row in rows])


def perplexity(row: Measurement) -> float:
    return float(np.exp(row.cross_entropy.mean()))


def _by_domain(sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    grouped: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        grouped.setdefault(sequence.domain, []).append(sequence)
    return list(grouped.values())
