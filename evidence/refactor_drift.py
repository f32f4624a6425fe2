"""How well the drift guard holds a budget on text that neither the recipe nor its thresholds have seen.

Three rotations: the recipe is fitted on four of six domains, its thresholds are chosen on those, and the other two are
served, each prompt of 256 tokens in one forward, by a guard that starts new and corrects between forwards as the engine
does. The guard's gains were once chosen with these six domains at hand. So two texts are served as well that had no
part in that, nor in the model's training: licences, and the rows of a load trace.

The error of a rotation is the largest |realised / nominal - 1| over texts and budgets, realised being the mean over all
tokens served, those before the first correction included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from evidence.figures import ROOT
from evidence.refactor_fits import BUDGETS, LENGTH, Fits, settings_of
from prism_runtime.engine.drift import DriftGuard
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.masked import LayerInput, token_ids
from prism_runtime.refactor.text import Document, TokenSequence, cut_sequences, read_documents

ROTATIONS = (0, 1, 2)
SEQUENCES = 56
"""Of a text, at most: 14,000 tokens."""
EVALUATION = ROOT / "examples" / "model" / "evaluation.jsonl.gz"
UNTUNED: dict[str, tuple[Path, ...]] = {
    "licences": (ROOT / "LICENSE", ROOT / "examples" / "model" / "NOTICE"),
    "load trace": (ROOT / "examples" / "traces" / "azure2023_conv.csv",),
}
POINT = 0


@dataclass(frozen=True, slots=True)
class Served:
    """One text at one budget: its realised budget divided by the nominal one, with the guard and without."""

    text: str
    permille: int
    tokens: int
    guarded: float
    unguarded: float


class DriftFigures:
    """Errors of one model's recipe of `sub_experts`, by rotation."""

    def __init__(self, fits: Fits, sub_experts: int) -> None:
        self._fits, self._sub_experts = fits, sub_experts

    def errors(self, rotations: Sequence[int], *, guarded: bool) -> list[float]:
        """In permille of the nominal budget, one value a rotation: its largest."""
        return [
            max(1000 * abs((each.guarded if guarded else each.unguarded) - 1) for each in self.served(rotation))
            for rotation in rotations
        ]

    @cache  # noqa: B019 - one instance a model, as long as the program runs
    def served(self, rotation: int) -> list[Served]:
        """Every text that the rotation has not seen, at every budget. The rotation's number is the recipe's seed."""
        domains = sorted(set(self._fits.domains))
        share = len(domains) // len(ROTATIONS)
        unseen = tuple(domains[rotation * share : (rotation + 1) * share])
        recipe = self._fits.recipe(settings_of(rotation, self._sub_experts, BUDGETS), unseen)
        return [
            Served(
                name,
                permille,
                sum(len(each.ids) for each in text),
                guarded=self._realised(recipe.method(permille), text, permille / 1000, guarded=True),
                unguarded=self._realised(recipe.method(permille), text, permille / 1000, guarded=False),
            )
            for name, text in self._texts(unseen)
            for permille in BUDGETS
        ]

    def _texts(self, unseen: Sequence[str]) -> Iterator[tuple[str, list[TokenSequence]]]:
        for domain in unseen:
            documents = [each for each in read_documents(EVALUATION) if each.domain == domain]
            yield domain, cut_sequences(documents, self._fits.tokenizer, LENGTH, SEQUENCES)
        for name, paths in UNTUNED.items():
            text = [Document(path.read_text(), name) for path in paths]
            yield name, cut_sequences(text, self._fits.tokenizer, LENGTH, SEQUENCES)

    def _realised(
        self, method: ElasticMethod, text: Sequence[TokenSequence], nominal: float, *, guarded: bool
    ) -> float:
        """Realised budget over nominal. The share of neurons is that of sub-experts, which the guard counts."""
        guard = DriftGuard({POINT: nominal})
        tokens, spent, routed = 0, 0.0, 0.0
        for sequence in text:
            shifted = replace(method, log_tau=method.log_tau + (guard.shift(POINT) if guarded else 0.0))
            cost, slots = self._forward(shifted, sequence)
            tokens, spent, routed = tokens + len(sequence.ids), spent + cost, routed + slots
            if guard.due(POINT, tokens):
                guard.correct(POINT, tokens, spent, routed)
        return spent / routed / nominal

    @torch.inference_mode()
    def _forward(self, method: ElasticMethod, sequence: TokenSequence) -> tuple[float, float]:
        """(neurons that ran and what choosing and compensating cost in neurons, neurons that were routed)."""
        cost = routed = 0.0

        def visit(entering: LayerInput) -> Tensor:
            nonlocal cost, routed
            output, spent = self._fits.masked.masked(method, entering)
            cost += float(spent.sum())
            routed += entering.rows.expert_ids.numel() * self._fits.neurons
            return output

        self._fits.masked.run(token_ids([sequence]), visit)
        return cost, routed
