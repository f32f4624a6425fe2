"""Lengths by cell: a mix of short and long requests costs more than its means say."""

import pytest

from prism_api.control import in_out_cell
from prism_operator.plan import demand
from prism_operator.plan.capacity import sustainable_rate
from prism_operator.plan.lengths import ENOUGH, HALF_LIFE_S, faded, with_moments
from prism_operator.plan.types import ClassDelta, DemandState, Lengths
from tests.unit.plan.factories import observation, profile, service_policy

NAME = "interactive"


def _cells(*requests: tuple[int, int]) -> tuple[float, ...]:
    cells = [0.0] * 16
    for prompt, output in requests:
        cells[in_out_cell(prompt, output)] += 20.0
    return tuple(cells)


def test_too_few_requests_leave_the_means_alone() -> None:
    few = tuple(ENOUGH / 2 if cell == 0 else 0.0 for cell in range(16))
    assert with_moments(100.0, 50.0, few) == Lengths(100.0, 50.0)
    assert with_moments(100.0, 50.0, ()) == Lengths(100.0, 50.0)


def test_equal_requests_have_less_context_than_exponential_ones() -> None:
    alike = with_moments(100.0, 50.0, _cells((100, 50)))
    assert alike.context_tokens == pytest.approx(100 + 1.155 * 50 / 2)
    assert alike.context_tokens < Lengths(100.0, 50.0).context_tokens == pytest.approx(150)


def test_a_mix_of_short_and_long_has_more_context_than_its_means() -> None:
    mixed = with_moments(2000.0, 300.0, _cells((100, 10), (8000, 1000)))
    apart = with_moments(2000.0, 300.0, _cells((8000, 10), (100, 1000)))
    exponential = Lengths(2000.0, 300.0)
    assert mixed.context_tokens > exponential.context_tokens
    assert apart.context_tokens < mixed.context_tokens, "long answers to short prompts hold less context"


def test_moments_keep_the_measured_means() -> None:
    lengths = with_moments(700.0, 90.0, _cells((100, 10), (3000, 400), (9000, 20)))
    assert (lengths.prompt_tokens, lengths.output_tokens) == (700.0, 90.0)
    assert lengths.prompt_cv_squared > 0.5


def test_long_context_lowers_capacity_where_context_costs() -> None:
    limits = profile()
    point = limits.points["full"].model_copy(update={"step_per_kilotoken_nanoseconds": 5_000_000})
    policy = service_policy().classes[0]
    mixed = with_moments(64.0, 32.0, _cells((100, 10), (8000, 1000)))
    alike = with_moments(64.0, 32.0, _cells((60, 30)))
    rates = [sustainable_rate(point, limits, policy, lengths).per_s for lengths in (mixed, alike)]
    assert rates[0] < rates[1]


def test_counts_halve_in_a_half_life_and_new_ones_are_added() -> None:
    cells = faded((), [4] + [0] * 15, 1.0)
    assert faded(cells, (), HALF_LIFE_S)[0] == pytest.approx(2.0)
    assert faded(cells, [1] + [0] * 15, HALF_LIFE_S)[0] == pytest.approx(3.0)


def test_demand_remembers_cells_of_finished_requests() -> None:
    policy, state = service_policy(), DemandState()
    counts = [0] * 16
    counts[in_out_cell(64, 32)] = 3
    grown = ClassDelta(arrived=3, finished=3, prompt_tokens=3 * 64, output_tokens=3 * 32, in_out=tuple(counts))
    for tick in range(30):
        state = demand.update(state, observation(float(tick), classes={NAME: grown}), policy)
    lengths = demand.mean_lengths(state, NAME)
    assert lengths is not None
    assert lengths.output_squared == pytest.approx(1.155 * 32**2)
