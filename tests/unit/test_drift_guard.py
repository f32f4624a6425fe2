"""The drift guard on synthetic traffic whose scores differ from those that the threshold was fitted on."""

import math
import random
from statistics import NormalDist

import pytest

from prism_runtime.engine.drift import DriftGuard, DriftSettings

CELLS = 64
"""Sub-experts routed for one token."""


def serve(
    guard: DriftGuard, nominal: float, drift: float, spread: float, tokens: int, step: int = 8, seed: int = 0
) -> list[float]:
    """Realised budget of every step. Log scores are N(drift, spread); the threshold was fitted at drift 0."""
    draws, scores = random.Random(seed), NormalDist(drift, spread)
    tau = NormalDist(0, spread).inv_cdf(1 - nominal)
    spent, budgets = 0.0, []
    for total in range(step, tokens + 1, step):
        share = 1 - scores.cdf(tau + guard.shift(0))
        noisy = min(max(draws.gauss(share, math.sqrt(share * (1 - share) / (CELLS * step))), 0), 1)
        spent += noisy * step * CELLS
        budgets.append(noisy)
        if guard.due(0, total):
            guard.correct(0, total, spent, total * CELLS)
    return budgets


@pytest.mark.parametrize("nominal", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("relative", [-0.1, 0.1])
def test_realised_mean_on_a_shifted_domain_stays_within_2_percent_of_nominal(
    nominal: float, spread: float, relative: float
) -> None:
    fitted = NormalDist(0, spread)
    drift = fitted.inv_cdf(1 - nominal) - fitted.inv_cdf(1 - nominal * (1 + relative))
    idle = DriftGuard({0: nominal}, DriftSettings(limit=1e-9))
    unguarded = serve(idle, nominal, drift, spread, 20_000)
    assert abs(sum(unguarded) / len(unguarded) / nominal - 1) > 0.08
    guard = DriftGuard({0: nominal})
    budgets = serve(guard, nominal, drift, spread, 20_000)
    assert sum(budgets) / len(budgets) == pytest.approx(nominal, rel=0.02)
    settled = budgets[len(budgets) // 4 :]
    assert sum(settled) / len(settled) == pytest.approx(nominal, rel=0.005)
    assert guard.realised(0) == pytest.approx(nominal, rel=0.02)
    assert not guard.at_limit(0)


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.2])
@pytest.mark.parametrize("step", [1, 32, 700, 4096])
def test_correction_does_not_swing_whatever_the_size_of_a_forward(step: int, spread: float) -> None:
    guard = DriftGuard({0: 0.5})
    serve(guard, 0.5, 0.2, spread, 50 * max(step, 256), step)
    assert guard.shift(0) == pytest.approx(0.2, abs=0.03)


def test_equal_counts_give_equal_shifts() -> None:
    first, second = DriftGuard({0: 0.5}), DriftGuard({0: 0.5})
    assert serve(first, 0.5, 0.1, 1.0, 4000) == serve(second, 0.5, 0.1, 1.0, 4000)
    assert first.shift(0) == second.shift(0) != 0


def test_shift_is_bounded_and_says_so_and_returns_when_the_traffic_does() -> None:
    guard = DriftGuard({0: 0.5}, DriftSettings(limit=0.3))
    serve(guard, 0.5, 3.0, 1.0, 20_000)
    assert guard.shift(0) == 0.3
    assert guard.at_limit(0)
    tokens, spent, routed = 20_000, guard.realised(0) * 20_000 * CELLS, 20_000 * CELLS
    for _ in range(24):
        tokens, spent, routed = tokens + 128, spent + 0.4 * 128 * CELLS, routed + 128 * CELLS
        guard.correct(0, tokens, spent, routed)
    assert guard.shift(0) < 0.3


def test_points_are_guarded_apart() -> None:
    guard = DriftGuard({0: 0.5, 2: 0.25})
    guard.correct(2, 1000, 300.0, 1000.0)
    assert guard.points == [0, 2]
    assert guard.shift(2) > 0
    assert guard.shift(0) == 0
    assert guard.realised(0) is None
    assert not guard.due(2, 1127)
    assert guard.due(2, 1128)


def test_what_is_held_is_told_over_the_window_and_not_before_the_first_correction() -> None:
    guard = DriftGuard({0: 0.5, 2: 0.25})
    serve(guard, 0.5, drift=0.2, spread=1.0, tokens=4096)
    calm, idle = guard.held()
    assert (calm.point, calm.nominal) == (0, 0.5)
    assert calm.realised == pytest.approx(0.5, rel=0.02)
    assert calm.shift == guard.shift(0) > 0.1
    assert not calm.at_limit
    assert (idle.point, idle.realised, idle.shift) == (2, None, 0.0)
