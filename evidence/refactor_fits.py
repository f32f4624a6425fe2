"""Fits and measurements that several figures of the refactoring engine share, each made at most once."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from evidence.refactor_cache import FitCache, digest_of_sequences
from prism_runtime.engine.model import load_pretrained
from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.refactor.artifact import digest_of_weights, open_artifact
from prism_runtime.refactor.baselines import OracleGate, TopK, calibrate_threshold, contiguous_groups
from prism_runtime.refactor.bootstrap import Floats
from prism_runtime.refactor.evaluate import Measurement, Subject, evaluate_methods
from prism_runtime.refactor.fit import (
    Calibrated,
    FittedPoint,
    FittedRecipe,
    GatedPartition,
    RecipeSettings,
    calibrate_recipe,
    fit_budget,
    fit_gated,
)
from prism_runtime.refactor.masked import MaskedModel, capture
from prism_runtime.refactor.method import Method
from prism_runtime.refactor.paper import PaperLayer, PaperMethod, PaperSettings, Schedule, fit_paper
from prism_runtime.refactor.points import Candidates, Run
from prism_runtime.refactor.stages import Output
from prism_runtime.refactor.text import Document, TokenSequence, cut_sequences, hold_out, read_documents
from prism_runtime.refactor.text import spread as spread_sequences

LENGTH = 256
BUDGETS = (750, 500, 250)
LADDER = tuple(range(250, 1000, 25))
PAPER_SUB_EXPERTS = 4
RANK = 8


GATE = ("weight", "bias", "mean", "deviation")
COMPENSATION = ("a", "u", "c")
OF_A_BUDGET = ("budgets_permille", "compensation", "rank", "rounds", "fit_sequences")
"""Settings that neither the partition nor the gates depend on."""


class Fits:
    """One model, its calibration text cut by seed, and what was fitted and measured on it.

    held        sequences of a domain, at the end of the calibration text, that thresholds are chosen on
    evaluation  most sequences of a domain of the evaluation text
    half        fit each seed on a random half of the rest, or all seeds on all of it
    spread      take every fourth document for thresholds instead, and all sequences evenly over their documents
    refit       fit again what the user's cache folder holds
    """

    def __init__(
        self,
        folder: Path,
        texts: Path,
        console: Console,
        *,
        held: int,
        evaluation: int,
        fit: int | None,
        half: bool,
        spread: bool = False,
        refit: bool = False,
    ) -> None:
        self._console, self._half = console, half
        self._cache = FitCache(digest_of_weights(folder), refit=refit)
        self.model, self.tokenizer = load_pretrained(folder)
        self.masked = MaskedModel(self.model)
        experts, self.neurons, self.hidden = self.masked.experts[0].gate.shape
        self.shape = (experts, self.neurons)
        self.top_k = int(self.model.config.get_text_config().num_experts_per_tok)
        calibration = read_documents(texts / "calibration.jsonl.gz")
        documents = read_documents(texts / "evaluation.jsonl.gz")
        if spread:
            for_fits, for_thresholds = hold_out(calibration)
            self.held = spread_sequences(self._cut(for_thresholds), held)
            self._pool = spread_sequences(self._cut(for_fits), fit)
            self.evaluation = spread_sequences(self._cut(documents), evaluation)
        else:
            domains = _by_domain(self._cut(calibration))
            self.held = [each for domain in domains for each in domain[-held:]]
            self._pool = [each for domain in domains for each in domain[:-held][:fit]]
            self.evaluation = self._cut(documents, evaluation)
        self.domains = [each.domain for each in self.evaluation]
        self._calibrated: tuple[Any, Calibrated] | None = None

    def _cut(self, documents: Sequence[Document], per_domain: int | None = None) -> list[TokenSequence]:
        return cut_sequences(documents, self.tokenizer, LENGTH, per_domain)

    def fit_text(self, seed: int, without: Sequence[str] = ()) -> list[TokenSequence]:
        """Calibration sequences of a seed, those of some domains left out."""
        pool = [each for each in self._pool if each.domain not in without]
        if not self._half:
            return pool
        drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [pool[index] for index in sorted(drawn[: len(drawn) // 2].tolist())]

    def held_text(self, without: Sequence[str] = ()) -> list[TokenSequence]:
        return [each for each in self.held if each.domain not in without]

    def recipe(self, settings: RecipeSettings, without: tuple[str, ...] = ()) -> FittedRecipe:
        """The recipe at the settings' budgets; `without` are domains that it sees nothing of. `masked` stands in its
        partition afterwards.
        """
        shared = self._gated(_without_budget(settings), without)
        self.masked.permute(shared.perms)
        points = {
            permille: self._point(replace(settings, budgets_permille=(permille,)), without)
            for permille in settings.budgets_permille
        }
        self.masked.permute(shared.perms)
        return FittedRecipe(shared.perms, shared.gates, shared.metric, points)

    @cache  # noqa: B019 - one instance a model, as long as the program runs
    def _gated(self, settings: RecipeSettings, without: tuple[str, ...]) -> GatedPartition:
        question = self._question(settings, without)
        tensors = self._cache.take("gated", question, lambda: self._fit_gated(settings, without)).tensors
        layers = range(len(self.masked.experts))
        return GatedPartition(
            perms=[tensors[f"{layer}.perm"] for layer in layers],
            gates=[
                GateWeights(
                    **{name: tensors[f"{layer}.gate.{name}"] for name in GATE},
                    token=tensors.get(f"{layer}.gate.token"),
                    kappa=settings.kappa,
                )
                for layer in layers
            ],
            metric=[tensors[f"{layer}.metric"] for layer in layers],
        )

    def _fit_gated(self, settings: RecipeSettings, without: tuple[str, ...]) -> Output:
        calibrated = self._calibrate(settings, without)
        self._unpermute()
        say = self._say(settings)
        found = fit_gated(self.masked, calibrated, self.held_text(without), settings, say)
        tensors = {}
        for layer, (perm, gate, metric) in enumerate(zip(found.perms, found.gates, found.metric, strict=True)):
            tensors |= {f"{layer}.perm": perm, f"{layer}.metric": metric}
            tensors |= {f"{layer}.gate.{name}": getattr(gate, name) for name in GATE}
            if gate.token is not None:
                tensors[f"{layer}.gate.token"] = gate.token
        return Output(tensors)

    def _calibrate(self, settings: RecipeSettings, without: tuple[str, ...]) -> Calibrated:
        """Large, so the last one alone is kept: recipes of one text follow each other."""
        key = (settings.metric, settings.fisher_samples, settings.seed, without)
        if self._calibrated is None or self._calibrated[0] != key:
            self._calibrated = None
            text = self.fit_text(settings.seed, without)
            self._calibrated = key, calibrate_recipe(self.model, text, settings, self._say(settings))
        return self._calibrated[1]

    @cache  # noqa: B019
    def _point(self, settings: RecipeSettings, without: tuple[str, ...]) -> FittedPoint:
        """Of settings with one budget."""
        question = self._question(settings, without)
        tensors = self._cache.take("point", question, lambda: self._fit_point(settings, without)).tensors
        compensation = None
        if settings.compensation is not None:
            layers = range(len(self.masked.experts))
            compensation = [
                CompensationWeights(*(tensors[f"{layer}.{name}"] for name in COMPENSATION)) for layer in layers
            ]
        return FittedPoint(tensors["log_tau"], compensation)

    def _fit_point(self, settings: RecipeSettings, without: tuple[str, ...]) -> Output:
        (permille,) = settings.budgets_permille
        self._say(settings)(f"budget {permille}")
        shared = self._gated(_without_budget(settings), without)
        self.masked.permute(shared.perms)
        texts = self.fit_text(settings.seed, without), self.held_text(without)
        found = fit_budget(self.masked, *texts, shared.gates, shared.metric, permille / 1000, settings)
        tensors = {"log_tau": found.log_tau}
        for layer, weights in enumerate(found.compensation or ()):
            tensors |= {f"{layer}.{name}": getattr(weights, name) for name in COMPENSATION}
        return Output(tensors)

    def _question(self, settings: RecipeSettings, without: tuple[str, ...]) -> dict[str, Any]:
        return {
            "settings": asdict(settings),
            "text": digest_of_sequences(self.fit_text(settings.seed, without)),
            "held": digest_of_sequences(self.held_text(without)),
        }

    def _say(self, settings: RecipeSettings) -> Any:
        label = f"seed {settings.seed}, {settings.sub_experts} sub-experts"
        return lambda step: self._console.print(f"{label}: {step}", highlight=False)

    @cache  # noqa: B019
    def prism(
        self, seed: int, sub_experts: int, budgets: tuple[int, ...] = BUDGETS, rank: int = RANK
    ) -> list[Measurement]:
        """One row a budget, in their order."""
        return self._prism_on(self.evaluation, settings_of(seed, sub_experts, budgets, rank))

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
        return self.oracle_on(settings_of(seed, sub_experts, ()))

    def oracle_on(self, settings: RecipeSettings) -> Measurement:
        """The same for any recipe; its budgets do not matter."""
        recipe = self.recipe(replace(settings, budgets_permille=()))
        groups = contiguous_groups(self.shape, len(recipe.perms), settings.sub_experts)
        gate = OracleGate("oracle", groups, settings.sub_experts, recipe.metric)
        calibrate_threshold(self.masked, gate, self.held, 0.5)
        return self._measure(self.evaluation, [gate])[0]

    @cache  # noqa: B019
    def paper(self, seed: int, schedule: Schedule) -> list[Measurement]:
        """The published method, one row for each number of active sub-experts from a quarter up."""
        settings = PaperSettings(PAPER_SUB_EXPERTS, schedule=schedule, seed=seed)
        question = {"settings": asdict(settings), "text": digest_of_sequences(self.fit_text(seed))}
        tensors = self._cache.take("paper", question, lambda: self._fit_paper(settings)).tensors
        layers = [
            PaperLayer(tensors[f"{layer}.perm"], tensors[f"{layer}.gate_neurons"])
            for layer in range(len(self.masked.experts))
        ]
        self.masked.permute([layer.perm for layer in layers])
        cells = self.top_k * PAPER_SUB_EXPERTS
        return self._measure(self.evaluation, [PaperMethod(layers, k, self.top_k) for k in range(cells // 4, cells)])

    def _fit_paper(self, settings: PaperSettings) -> Output:
        self._console.print(f"seed {settings.seed}, paper, {settings.schedule}", highlight=False)
        self._unpermute()
        rows = capture(self.model, self.fit_text(settings.seed))
        tensors = {}
        for layer, (experts, layer_rows) in enumerate(zip(self.masked.experts, rows, strict=True)):
            found = fit_paper(experts, layer_rows, settings, layer=layer)
            tensors |= {f"{layer}.perm": found.perm, f"{layer}.gate_neurons": found.gate_neurons}
        return Output(tensors)

    def runs(self, seeds: Sequence[int], sub_experts: int) -> list[Run]:
        """The ladder's candidates for every seed, on the evaluation text and on the held-out calibration text."""
        rows = [self.prism(seed, sub_experts, LADDER) for seed in seeds]
        rows += [self._prism_on(self.held, settings_of(seed, sub_experts, LADDER)) for seed in seeds]
        return [run_of(each) for each in rows]

    def top_k_runs(self, renormalised: bool) -> list[Run]:
        """Top-k has no seed: both texts, and the evaluation text's halves."""
        self._unpermute()
        methods = [TopK(kept, renormalised) for kept in range(1, self.top_k)]
        texts = (self.evaluation, self.held, self.evaluation[::2], self.evaluation[1::2])
        return [run_of(self._measure(text, methods)) for text in texts]

    def recipe_rows(self, settings: RecipeSettings) -> list[Measurement]:
        """Any recipe on the evaluation text, one row a budget."""
        return self._prism_on(self.evaluation, settings)

    def _prism_on(self, text: Sequence[TokenSequence], settings: RecipeSettings) -> list[Measurement]:
        recipe = self.recipe(settings)
        return self._measure(text, [recipe.method(permille) for permille in settings.budgets_permille])

    def _unpermute(self) -> None:
        order = torch.arange(self.neurons).expand(*self.shape)
        self.masked.permute([order for _ in self.masked.experts])

    def measure(self, method: Method, text: Sequence[TokenSequence] | None = None) -> Measurement:
        """Any method on the evaluation text or another, for the partition that `masked` stands in."""
        return self._measure(self.evaluation if text is None else text, [method])[0]

    def _measure(self, text: Sequence[TokenSequence], methods: Sequence[Method]) -> list[Measurement]:
        return evaluate_methods(self.masked, text, [Subject(method.name, 0.0, method) for method in methods])


def settings_of(seed: int, sub_experts: int, budgets: tuple[int, ...], rank: int = RANK) -> RecipeSettings:
    """The recipe as it is published."""
    return RecipeSettings(sub_experts=sub_experts, budgets_permille=budgets, rank=rank, seed=seed)


def small_moe(root: Path, console: Console, *, refit: bool = False) -> Fits:
    """The embedded model, from the inverse of its artifact's permutation."""
    artifact = open_artifact(root / "artifact")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        for path in artifact.directory.iterdir():
            if not path.name.startswith(("model", "prism_")):
                (source / path.name).write_bytes(path.read_bytes())
        artifact.restore_source(source)
        return Fits(source, root, console, held=24, evaluation=24, fit=None, half=True, refit=refit)


def candidates_of(rows: Sequence[Measurement], nominal: Sequence[float]) -> Candidates:
    return Candidates(np.array(nominal), costs(rows), np.stack([row.kl for row in rows]))


def run_of(rows: Sequence[Measurement]) -> Run:
    return Run(costs(rows), np.array([row.kl.mean() for row in rows]))


def costs(rows: Sequence[Measurement]) -> Floats:
    return np.array([row.realised for row in rows])


def perplexity(row: Measurement) -> float:
    return float(np.exp(row.cross_entropy.mean()))


def _without_budget(settings: RecipeSettings) -> RecipeSettings:
    unset: dict[str, Any] = {name: getattr(RecipeSettings(), name) for name in OF_A_BUDGET}
    return replace(settings, **unset)


def _by_domain(sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    grouped: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        grouped.setdefault(sequence.domain, []).append(sequence)
    return list(grouped.values())
