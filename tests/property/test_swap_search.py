"""The partition search: what it may never do, and that compiled code and NumPy cannot be told apart."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime import native
from prism_runtime.refactor import swap
from prism_runtime.refactor.swap import SOURCE, geometric, mass_deltas, mass_search, swap_search

Array = npt.NDArray[np.float32]


def expert(seed: int, rows: int, neurons: int) -> tuple[Array, Array]:
    """Rows in which neurons fire together in threes, and a Gram matrix with cross terms."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((rows, -(-neurons // 3))).repeat(3, axis=1)[:, :neurons]
    down = random.standard_normal((neurons, neurons // 2 + 1))
    scale = np.exp(random.standard_normal(neurons))
    return ((shared + random.standard_normal((rows, neurons))) * scale).astype("f4"), (down @ down.T).astype("f4")


def groups_of(neurons: int, sub_experts: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(np.arange(neurons) // (neurons // sub_experts))


def definition(rows: Array, gram: Array, part: npt.ArrayLike, limits: list[float], weights: list[float]) -> float:
    """The objective in float64, as the docstring of `swap_search` has it."""
    total, groups = 0.0, np.asarray(part)
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        mine, inner = rows[:, members].astype(float), gram[np.ix_(members, members)].astype(float)
        energy = np.einsum("bi,ij,bj->b", mine, inner, mine)
        total += sum(w * np.minimum(energy, limit).sum() for limit, w in zip(limits, weights, strict=True))
    return total


def mass_definition(rows: npt.NDArray[np.float64], part: npt.ArrayLike, off: int) -> float:
    groups = np.asarray(part)
    mass = np.stack([rows[:, groups == group].sum(1) for group in range(groups.max() + 1)], 1)
    return float(np.sort(mass, 1)[:, :off].sum())


seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 530), st.integers(2, 5), st.integers(1, 6))
"""Rows on both sides of one and two blocks, sub-experts, neurons a sub-expert."""


@given(seeds, shapes, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_compiled_and_numpy_searches_give_the_same_bits(
    seed: int, shape: tuple[int, int, int], screen: bool, annealed: bool
) -> None:
    if native.library(SOURCE) is None:
        pytest.skip("no C compiler here: there is only one implementation to run")
    count, sub_experts, size = shape
    rows, gram = expert(seed, count, sub_experts * size)
    start = groups_of(sub_experts * size, sub_experts, seed)
    temperatures = geometric(float(np.abs(rows).max()), 0.97, 150) if annealed else None

    def both(compiled: bool) -> list[swap.SwapResult]:
        energy = swap_search(
            rows,
            gram,
            start,
            [5.0, 60.0],
            [0.3, 0.1],
            150,
            seed,
            temperatures=temperatures,
            screen=screen,
            compiled=compiled,
        )
        mass = mass_search(
            np.abs(rows), start, sub_experts - 1, 150, seed, temperatures=temperatures, compiled=compiled
        )
        return [energy, mass]

    for ours, theirs in zip(both(True), both(False), strict=True):
        assert ours.part.tolist() == theirs.part.tolist()
        assert (ours.objective, ours.start_objective) == (theirs.objective, theirs.start_objective)


@given(seeds, shapes, st.booleans())
@settings(max_examples=40, deadline=None)
def test_groups_stay_equal_and_no_start_is_worsened(seed: int, shape: tuple[int, int, int], hot: bool) -> None:
    count, sub_experts, size = shape
    rows, gram = expert(seed, count, sub_experts * size)
    start = groups_of(sub_experts * size, sub_experts, seed)
    temperatures = geometric(1e9, 1.0, 300) if hot else None
    for found in (
        swap_search(rows, gram, start, [20.0], [1.0], 300, seed, temperatures=temperatures),
        mass_search(np.abs(rows), start, 1, 300, seed, temperatures=temperatures),
    ):
        assert set(Counter(found.part.tolist()).values()) == {size}
        assert found.objective <= found.start_objective


@given(seeds, shapes)
@settings(max_examples=40, deadline=None)
def test_objectives_are_those_of_the_definition_after_any_number_of_swaps(
    seed: int, shape: tuple[int, int, int]
) -> None:
    count, sub_experts, size = shape
    rows, gram = expert(seed, count, sub_experts * size)
    start = groups_of(sub_experts * size, sub_experts, seed)
    limits, weights = [3.0, 40.0, 1e30], [0.5, 0.2, 1e-3]
    found = swap_search(rows, gram, start, limits, weights, 300, seed)
    assert found.start_objective == pytest.approx(definition(rows, gram, start, limits, weights), rel=1e-4)
    assert found.objective == pytest.approx(definition(rows, gram, found.part, limits, weights), rel=1e-4)
    masses = np.abs(rows).astype(float)
    for off in range(1, sub_experts):
        by_mass = mass_search(masses, start, off, 100, seed)
        assert by_mass.start_objective == pytest.approx(mass_definition(masses, start, off), rel=1e-12)
        assert by_mass.objective == pytest.approx(mass_definition(masses, by_mass.part, off), rel=1e-12)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_an_increment_is_what_the_swap_adds_by_the_definition(seed: int) -> None:
    """Of four neurons in two groups there are four swaps, and every increment is that of one of them."""
    rows, _ = expert(seed, 300, 4)
    masses, start = np.abs(rows).astype(float), np.array([0, 0, 1, 1])
    before = mass_definition(masses, start, 1)
    swapped = [np.array([1, 0, 0, 1]), np.array([1, 0, 1, 0]), np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])]
    possible = [mass_definition(masses, part, 1) - before for part in swapped]
    for delta in mass_deltas(masses, start, 1, 50, seed):
        assert min(abs(delta - other) for other in possible) <= 1e-9 * before


def test_a_search_finds_the_neurons_that_fire_together() -> None:
    random = np.random.default_rng(1)
    fires = random.random((600, 4)) < 0.25
    rows = (fires.repeat(6, axis=1) * (1 + random.random((600, 24)))).astype("f4")
    start = np.arange(24) % 4
    cooled = geometric(300.0, 0.998, 6_000)
    found = swap_search(rows, np.eye(24, dtype="f4"), start, [4.0], [1.0], 6_000, 0, temperatures=cooled)
    by_mass = mass_search(rows, start, 3, 6_000, 0, temperatures=cooled)
    for part in (found.part.tolist(), by_mass.part.tolist()):
        assert [len(set(part[team : team + 6])) for team in range(0, 24, 6)] == [1, 1, 1, 1]


def test_screening_rejects_only_what_it_may_and_still_descends() -> None:
    rows, gram = expert(7, 1_500, 32)
    start = groups_of(32, 4, 7)
    screened, full = (
        swap_search(rows, gram, start, [50.0], [1.0], 3_000, 7, screen=screen) for screen in (True, False)
    )
    gained = full.start_objective - full.objective
    assert gained > 0
    assert screened.start_objective - screened.objective > 0.8 * gained


def test_seeds_of_several_parts_give_different_searches_and_equal_seeds_equal_ones() -> None:
    rows, gram = expert(3, 400, 40)
    start = groups_of(40, 4, 3)
    first, again, other = (
        swap_search(rows, gram, start, [30.0], [1.0], 60, seed).part.tolist()
        for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("start", "message"),
    [([0, 0, 0, 1], "neurons: two or more of one size"), ([0, 0, 0, 0], "of one size"), ([0, 1], r"must be \[B, C\]")],
)
def test_a_start_that_is_no_partition_is_refused(start: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swap_search(np.ones((3, 4)), np.eye(4), start, [1.0], [1.0], 1, 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gram is"):
        swap_search(np.ones((3, 4)), np.eye(3), [0, 0, 1, 1], [1.0], [1.0], 1, 0)
    with pytest.raises(ValueError, match="as many of each"):
        swap_search(np.ones((3, 4)), np.eye(4), [0, 0, 1, 1], [1.0], [], 1, 0)
    with pytest.raises(ValueError, match="sub-experts off"):
        mass_search(np.ones((3, 4)), [0, 0, 1, 1], 2, 1, 0)
    with pytest.raises(ValueError, match="one for each"):
        mass_search(np.ones((3, 4)), [0, 0, 1, 1], 1, 5, 0, temperatures=np.ones(4))
