"""SmolLM2 as a mixture of one expert a layer: perplexities of the recipe and of choices neuron by neuron.

With one expert a layer there is no routing to save on, so every budget is won inside of experts. Documents of the
calibration text alternate between fits and thresholds, and all sequences are spread over their documents. Every cost
is counted: gates, token factors, compensation, and the gate projection where it runs for neurons that are dropped.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from rich.console import Console

from evidence.refactor_fits import Fits, perplexity, settings_of
from prism_runtime.refactor.compensation import Repaired, fit_repair
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.evaluate import Measurement
from prism_runtime.refactor.fit import Allocation, FittedRecipe, RecipeSettings, fit_budget
from prism_runtime.refactor.gate_first import GateFirst, SlicesThenNeurons
from prism_runtime.refactor.masked import LayerRows, capture
from prism_runtime.refactor.thresholds import AnyThresholded, calibrate_thresholds, everything

SUB_EXPERTS = 48
"""Of 1,536 neurons: 32 each, which a kernel can slice."""
FIT, HELD, EVALUATION = 14, 4, 8
"""Sequences of a domain."""
RECIPE = replace(
    settings_of(0, SUB_EXPERTS, (750, 500), rank=32), fisher_samples=1, proposals=200_000, partition_rows=2_000
)
ALLOCATIONS: tuple[Allocation, ...] = ("single", "layer")
SIZING_SEQUENCES = 12
"""Give 3,000 tokens for the mean square of an up projection."""
SURVIVING = {750: 0.9, 500: 0.7}
"""Share of the slices whose gate projection runs where neurons are chosen inside of slices, by per-mille of budget."""


class SmolLM2Figures:
    """Measured once each. Perplexities and realised budgets are of the evaluation text."""

    def __init__(self, folder: Path, texts: Path, console: Console, *, refit: bool = False) -> None:
        self._fits = Fits(
            folder, texts, console, held=HELD, evaluation=EVALUATION, fit=FIT, half=False, spread=True, refit=refit
        )

    @property
    def full(self) -> float:
        return perplexity(self._fits.full)

    @cache  # noqa: B019 - one instance, as long as the program runs
    def recipe(self, permille: int) -> Measurement:
        """Whole slices by the gate's threshold."""
        return self._fits.measure(self._fitted(permille, replace(RECIPE, allocation=self.allocation)))

    @cache  # noqa: B019
    def bare(self, permille: int) -> Measurement:
        """The same without compensation."""
        return self._fits.measure(self._fitted(permille, _bare(replace(RECIPE, allocation=self.allocation))))

    @cached_property
    def allocation(self) -> Allocation:
        """That which loses less on the held-out text at half budget, before compensation; the partition is the same."""

        def loss(allocation: Allocation) -> float:
            method = self._fitted(500, _bare(replace(RECIPE, allocation=allocation)))
            return float(self._fits.measure(method, self._fits.held).kl.mean())

        return min(ALLOCATIONS, key=loss)

    def _fitted(self, permille: int, settings: RecipeSettings) -> ElasticMethod:
        shared, fits = self._shared, self._fits
        texts = fits.fit_text(0), fits.held
        return fit_budget(fits.masked, *texts, shared.gates, shared.metric, permille / 1000, settings)

    @cache  # noqa: B019
    def neurons(self, permille: int) -> Measurement:
        """Neuron by neuron, after the whole gate projection, without compensation."""
        shared = self._shared
        gate = GateFirst("gate first", self._fits.masked.experts, self._sizing, shared.metric)
        return self._fits.measure(self._calibrated(gate, permille))

    @cache  # noqa: B019
    def neurons_of_slices(self, permille: int) -> Measurement:
        """Slices first, then neurons of those that survive, and compensation for what either drops."""
        shared, masked = self._shared, self._fits.masked
        every = ElasticMethod(shared.gates, everything(len(shared.gates)))
        slices = calibrate_thresholds(masked, self._fits.held, every, SURVIVING[permille], by_layer=True)
        bare = SlicesThenNeurons("slices, then neurons", masked.experts, self._sizing, shared.metric, slices)
        bare = self._calibrated(bare, permille)
        repair = fit_repair(masked, self._fits.fit_text(0), bare, shared.metric, RECIPE.rank, SUB_EXPERTS)
        return self._fits.measure(self._calibrated(Repaired(bare, repair), permille))

    def _calibrated(self, method: AnyThresholded, permille: int) -> AnyThresholded:
        return calibrate_thresholds(self._fits.masked, self._fits.held, method, permille / 1000, by_layer=True)

    @property
    def _shared(self) -> FittedRecipe:
        """Partition and gates; the model stands in the partition afterwards."""
        return self._fits.recipe(replace(RECIPE, budgets_permille=()))

    @cached_property
    def _sizing(self) -> Sequence[LayerRows]:
        text = self._fits.fit_text(0)
        return capture(self._fits.model, text[:: -(-len(text) // SIZING_SEQUENCES)])


def _bare(settings: RecipeSettings) -> RecipeSettings:
    return replace(settings, compensation=None)
