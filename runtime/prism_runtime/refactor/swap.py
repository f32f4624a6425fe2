"""Swap searches over one expert's neurons: which neurons form which sub-expert. Compiled, or NumPy with the same bits.

A search exchanges two neurons of two sub-experts at a time and keeps the exchange if the objective falls; with a
temperature also, now and then, if it rises. Sub-experts keep their size. The best state seen is returned: no start is
worsened. `swap.c` states the order of every sum, which both implementations follow.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_runtime import native
from prism_runtime.refactor.swap_reference import BLOCK, Doubles, EnergySearch, MassSearch, Part, Values

SOURCE = Path(__file__).with_name("swap.c")
REFRESH_EVERY = 2_000
"""Accepted swaps between two computations from scratch: float32 energies drift by some 1e-7 of themselves a swap."""

ROTATE_EVERY = 256
"""Proposals after which another block of rows is looked at first.

With one first block throughout, what that block dislikes is never taken: a tenth of the gain on the embedded model.
With another one for every proposal, large experts' rows would come from memory and not from the processor's cache.
"""

Seed = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class SwapResult:
    """part [C] int32: sub-expert of every neuron. Objectives are computed from scratch, not from increments."""

    part: Part
    objective: float
    start_objective: float


def swap_search(
    rows: npt.ArrayLike,
    gram: npt.ArrayLike,
    start: npt.ArrayLike,
    limits: Sequence[float],
    weights: Sequence[float],
    proposals: int,
    seed: Seed,
    *,
    temperatures: Doubles | None = None,
    screen: bool = True,
    compiled: bool = True,
) -> SwapResult:
    """Minimises sum over rows t, sub-experts n and limits j of weights[j] * min(b_n' G_nn b_n, limits[j]).

    rows     [B, C] float32  a neuron's contribution b to row t
    gram     [C, C] float32  symmetric; G_nn are its rows and columns of sub-expert n
    start    [C]             sub-expert of every neuron, ids 0..N-1, all of one size
    temperatures  [proposals]  of simulated annealing, in units of the objective; None descends
    screen   give a proposal up at the first block of 256 rows after which it does not improve: some good swaps are
             missed, and several times as many proposals fit the same time. Rows should be in random order.
    compiled  False runs NumPy even where a compiler is found

    Equal inputs give equal bytes on every path. Raises ValueError for shapes that do not fit.
    """
    rows, gram = np.asarray(rows, np.float32), np.ascontiguousarray(gram, np.float32)
    part, sub_experts = _checked(start, rows)
    if gram.shape != (len(part), len(part)):
        raise ValueError(f"gram is {gram.shape}, rows have {len(part)} neurons: it must be [C, C]")
    if len(limits) != len(weights) or not limits:
        raise ValueError(f"{len(limits)} limits and {len(weights)} weights: as many of each, and at least one")
    limit, weight = np.asarray(limits, np.float32), np.asarray(weights, np.float32)
    pairs, slack = _proposals(len(part), sub_experts, proposals, seed, temperatures)
    state = EnergySearch(_blocked(rows), gram, limit, weight, sub_experts)
    return _searched(state, part, pairs, slack, screen and temperatures is None, compiled)[0]


def mass_search(
    rows: npt.ArrayLike,
    start: npt.ArrayLike,
    off: int,
    proposals: int,
    seed: Seed,
    *,
    temperatures: Doubles | None = None,
    compiled: bool = True,
) -> SwapResult:
    """Minimises the sum over rows of the `off` smallest of the sub-experts' sums of rows [B, C], in float64.

    rows are magnitudes: not negative. Otherwise as `swap_search`. Source: MoE-Prism, arXiv 2510.19366v1, section 4.1.
    """
    rows = np.asarray(rows, np.float64)
    part, sub_experts = _checked(start, rows)
    if not 0 < off < sub_experts:
        raise ValueError(f"{off} of {sub_experts} sub-experts off: between 1 and {sub_experts - 1} can be")
    pairs, slack = _proposals(len(part), sub_experts, proposals, seed, temperatures)
    return _searched(MassSearch(_blocked(rows), off, sub_experts), part, pairs, slack, False, compiled)[0]


def mass_deltas(rows: npt.ArrayLike, start: npt.ArrayLike, off: int, proposals: int, seed: Seed) -> Doubles:
    """[proposals]: what random swaps of the start would add to the objective of `mass_search`. None is taken."""
    rows = np.asarray(rows, np.float64)
    part, sub_experts = _checked(start, rows)
    pairs, slack = _proposals(len(part), sub_experts, proposals, seed, None)
    never = np.full_like(slack, -np.inf)
    return _searched(MassSearch(_blocked(rows), off, sub_experts), part, pairs, never, False, True)[1]


def geometric(first: float, factor: float, proposals: int) -> Doubles:
    """[proposals]: temperatures first, first * factor, first * factor^2, ..."""
    with np.errstate(under="ignore"):
        return first * factor ** np.arange(proposals, dtype=np.float64)


def _checked(start: npt.ArrayLike, rows: Values) -> tuple[Part, int]:
    part = np.asarray(start).astype(np.int32)
    if rows.ndim != 2 or part.shape != rows.shape[1:] or not rows.size:
        raise ValueError(f"rows are {rows.shape}, the start {part.shape}: they must be [B, C] and [C], not empty")
    sizes = np.bincount(part) if part.min() >= 0 else np.zeros(1, np.int64)
    if len(sizes) < 2 or sizes.min() != sizes.max():
        raise ValueError(f"the start's sub-experts have {sizes.tolist()} neurons: two or more of one size are needed")
    return part, len(sizes)


def _blocked(rows: Values) -> Values:
    """[B, C] -> [blocks, C, BLOCK], zero-padded: a block of all neurons fits a processor's own cache."""
    blocks = -(-len(rows) // BLOCK)
    padded = np.zeros((blocks * BLOCK, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK, -1).transpose(0, 2, 1))


def _proposals(
    neurons: int, sub_experts: int, proposals: int, seed: Seed, temperatures: Doubles | None
) -> tuple[Part, Doubles]:
    """pairs [proposals, 2]: a neuron, and which of those outside its sub-expert; slack [proposals]: see `swap.c`.

    Only the raw stream of the bit generator is used: NumPy promises that it never changes, unlike its distributions.
    """
    outside = neurons - neurons // sub_experts
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(3 * proposals).reshape(proposals, 3)
    high = raw[:, :2] >> np.uint64(32)
    pairs = ((high * np.array([neurons, outside], np.uint64)) >> np.uint64(32)).astype(np.int32)
    if temperatures is None:
        return pairs, np.zeros(proposals)
    if temperatures.shape != (proposals,):
        raise ValueError(f"{temperatures.shape} temperatures for {proposals} proposals: one for each is needed")
    uniform = ((raw[:, 2] >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
    return pairs, temperatures * -np.log(uniform)


def _searched(
    search: EnergySearch | MassSearch, part: Part, pairs: Part, slack: Doubles, screen: bool, compiled: bool
) -> tuple[SwapResult, Doubles]:
    """The result, whose part is `part`, and what every proposal would have added."""
    deltas = np.zeros(len(pairs))
    library = native.library(SOURCE) if compiled else None
    if library is None:
        objective = search.run(part, pairs, slack, screen, ROTATE_EVERY, REFRESH_EVERY, deltas)
        return SwapResult(part, objective[1], objective[0]), deltas
    objectives = np.zeros(2)
    sizes = [ctypes.c_int32(size) for size in (search.rows.shape[1], search.sub_experts, len(search.rows))]
    found = _address(part), _address(objectives), _address(deltas)
    drawn = ctypes.c_int64(len(pairs)), _address(pairs), _address(slack)
    rotate, refresh = ctypes.c_int32(ROTATE_EVERY), ctypes.c_int32(REFRESH_EVERY)
    if isinstance(search, EnergySearch):
        limits = ctypes.c_int32(len(search.limit)), _address(search.limit), _address(search.weight)
        inputs = _address(search.rows), _address(search.gram), *sizes, *limits
        status = library.prism_swap_energies(*inputs, *drawn, ctypes.c_int32(screen), rotate, refresh, *found)
    else:
        inputs = _address(search.rows), *sizes, ctypes.c_int32(search.off)
        status = library.prism_swap_masses(*inputs, *drawn, rotate, refresh, *found)
    if status:
        raise MemoryError(f"no memory for a swap search over {search.rows.nbytes >> 20} MiB of rows")
    return SwapResult(part, float(objectives[1]), float(objectives[0])), deltas


def _address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
