"""A budget is divided over layers as the definition says, and as what was measured says."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_runtime.refactor.allocation import STEP, LayerLosses, allocate, layer_budgets

LEVELS = 5


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    layers = draw(st.integers(1, 4))
    loss = draw(st.lists(st.floats(0, 10), min_size=layers * LEVELS, max_size=layers * LEVELS))
    return np.array(loss).reshape(layers, LEVELS), draw(st.integers(layers, layers * LEVELS))


@given(knapsacks())
def test_no_other_division_of_the_units_loses_less(knapsack: tuple[np.ndarray, int]) -> None:
    loss, units = knapsack
    found = allocate(loss, units)
    assert sum(found) + len(loss) == units
    cheapest = min(
        sum(loss[layer, level] for layer, level in enumerate(levels))
        for levels in itertools.product(range(LEVELS), repeat=len(loss))
        if sum(levels) + len(loss) == units
    )
    assert sum(loss[layer, level] for layer, level in enumerate(found)) == pytest.approx(cheapest)


@pytest.mark.parametrize("units", [2, 16])
def test_units_that_no_division_can_spend_are_refused(units: int) -> None:
    with pytest.raises(ValueError, match="3 layers of 1 to 5 units each cannot spend"):
        allocate(np.zeros((3, LEVELS)), units)


def losses(*sizes: float) -> LayerLosses:
    budget = np.linspace(0.1, 0.9, 9)
    return LayerLosses(np.tile(budget, (len(sizes), 1)), np.array([size * np.exp(-5 * budget) for size in sizes]))


def test_a_layer_whose_losses_are_larger_gets_more_and_the_mean_is_the_budget() -> None:
    found = layer_budgets(losses(1.0, 1.0, 8.0), 0.5)
    assert found.mean().item() == pytest.approx(0.5, abs=STEP / 3)
    assert found[2] > found[0] + 0.1
    assert abs(found[0] - found[1]) <= STEP + 1e-6


def test_layers_that_lose_alike_get_alike() -> None:
    assert np.ptp(layer_budgets(losses(1.0, 1.0, 1.0, 1.0), 0.4).numpy()) <= STEP + 1e-6


def test_more_budget_never_loses_more_however_noisy_the_measurement() -> None:
    noisy = LayerLosses(np.array([[0.2, 0.4, 0.6, 0.8]]), np.array([[0.3, 0.1, 0.12, 0.02]]))
    grid = noisy.on_grid()[0]
    assert (np.diff(grid) <= 1e-12).all()
    assert grid[-1] == 0
    assert grid[0] > 0.3, "below what was measured it goes on rising"
