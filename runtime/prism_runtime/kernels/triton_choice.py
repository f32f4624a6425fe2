# mypy: disable-error-code="no-untyped-def"
"""Triton programs that choose the cells of a forward and prepare their compensation, without a word from the host.

Which point a row stands at is read here, from the live plan on the device: a captured CUDA graph goes on to be right
when the plan changes between two replays, from prefixes to thresholds too. `selection` and `gating` say the same in
torch, and batch points and capped points are theirs alone.
"""

import triton
import triton.language as tl

from prism_runtime.kernels.plan import PREFIX as PREFIX_MODE
from prism_runtime.kernels.selection import RMS_FLOOR, SENSITIVITY_EXPONENT, SENSITIVITY_LIMIT

PREFIX = tl.constexpr(PREFIX_MODE)
FLOOR = tl.constexpr(RMS_FLOOR)
EXPONENT, LIMIT = tl.constexpr(SENSITIVITY_EXPONENT), tl.constexpr(SENSITIVITY_LIMIT)


@triton.jit(do_not_specialize=["layer"])
def choose_cells(
    hidden,  # [T, H]
    expert_ids,  # [T, K] int64
    router_weights,  # [T, K] float32
    residual_rms,  # [T] float32; this and the gate's are not read without GATED
    row_class,  # [T] int32
    class_point,  # [classes] int32
    mode,  # [P] int32
    count,  # [P, L, R] int32
    tau,  # [P, L] float32
    shift,  # [P] float32
    gate,  # [E, N, H] float32
    bias,  # [E, N] float32
    mean,  # [E, N] float32
    deviation,  # [E, N] float32
    token,  # [H + 3] float32; not read without TOKEN
    keep,  # out: [T, K, N] int8
    outputs,  # out: [T, K, tiles of N] int32, gate outputs evaluated; not written without GATED
    layer,
    kappa,
    L: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    GATED: tl.constexpr,
    TOKEN: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
    CELLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """CELLS sub-experts of one slot. Grid: (T K, tiles of N)."""
    slot, tile = tl.program_id(0), tl.program_id(1)
    row = slot // K
    place = slot - row * K
    own_class = tl.load(row_class + row)
    expert = tl.load(expert_ids + slot)
    cells = tile * CELLS + tl.arange(0, CELLS)
    real = cells < N
    count_at = outputs + slot * tl.num_programs(1) + tile
    if (own_class < 0) | (expert >= E):
        tl.store(keep + slot * N + cells, tl.zeros((CELLS,), tl.int8), mask=real)
        if GATED:
            tl.store(count_at, 0)
        return
    point = tl.load(class_point + own_class)
    others = tl.arange(0, SLOTS)
    weights = tl.load(router_weights + row * K + others, mask=others < K, other=float("-inf"))
    weight = tl.load(router_weights + slot)
    if tl.load(mode + point) == PREFIX:
        rank = 0
        if R > 1:
            rank = tl.sum(((weights > weight) | ((weights == weight) & (others < place))).to(tl.int32))
        kept = real & (cells < tl.load(count + (point * L + layer) * R + rank))
        tl.store(keep + slot * N + cells, kept.to(tl.int8), mask=real)
        if GATED:
            tl.store(count_at, 0)
    elif GATED:
        rms = tl.maximum(tl.load(residual_rms + row), FLOOR)
        log_scale = tl.log(weight) - tl.log(rms)
        if TOKEN:
            log_scale += _sensitivity(hidden + row.to(tl.int64) * H, token, rms, H, DEPTH)
        threshold = tl.load(tau + point * L + layer) + tl.load(shift + point)
        predicted = tl.load(mean + expert * N + cells, mask=real, other=0.0)
        opened = real
        if ADAPTIVE:
            wide = kappa * tl.load(deviation + expert * N + cells, mask=real, other=0.0)
            opened = real & (tl.abs(threshold - log_scale - predicted) < wide)
        evaluated = tl.sum(opened.to(tl.int32))
        tl.store(count_at, evaluated)
        if evaluated > 0:
            product = tl.zeros((CELLS, DEPTH), tl.float32)
            for begin in range(0, H, DEPTH):
                depth = begin + tl.arange(0, DEPTH)
                deep = depth < H
                x = tl.load(hidden + row.to(tl.int64) * H + depth, mask=deep, other=0.0).to(tl.float32)
                at = gate + (expert * N + cells)[:, None] * H + depth[None, :]
                product += tl.load(at, mask=opened[:, None] & deep[None, :], other=0.0) * x[None, :]
            value = tl.sum(product, 1) + tl.load(bias + expert * N + cells, mask=real, other=0.0)
            predicted = tl.where(opened, value, predicted)
        of_experts = tl.load(expert_ids + row * K + others, mask=others < K, other=E)
        valid = tl.where(of_experts < E, weights, float("-inf"))
        heavier = (valid > weight) | ((valid == weight) & (others < place))
        heaviest = tl.sum(heavier.to(tl.int32)) == 0
        kept = real & ((predicted + log_scale >= threshold) | (heaviest & (cells == 0)))
        tl.store(keep + slot * N + cells, kept.to(tl.int8), mask=real)
    else:
        tl.store(keep + slot * N + cells, tl.zeros((CELLS,), tl.int8), mask=real)


@triton.jit
def _sensitivity(x, token, rms, H: tl.constexpr, DEPTH: tl.constexpr):
    """The fitted part of `selection.log_token_factor` for one row."""
    product = tl.zeros((DEPTH,), tl.float32)
    for begin in range(0, H, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        deep = depth < H
        product += tl.load(x + depth, mask=deep, other=0.0).to(tl.float32) * tl.load(
            token + depth, mask=deep, other=0.0
        )
    fitted = tl.sum(product) + rms * tl.load(token + H) + tl.log(rms) * tl.load(token + H + 1) + tl.load(token + H + 2)
    return tl.minimum(tl.maximum(EXPONENT * fitted, -LIMIT), LIMIT)


@triton.jit
def compensation_inner(
    hidden,  # [T, H]
    expert_ids,  # [T, K] int64
    router_weights,  # [T, K] float32
    row_class,  # [T] int32
    class_point,  # [classes] int32
    index,  # [P] int32: which compensation a point has, -1 for none
    a,  # [C, H + 1, r] float32
    c,  # [C, E, N, r] float32
    keep,  # [T, K, N] int8
    inner,  # out: [T, r] float32
    K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    SLOTS: tl.constexpr,  # K, N and R rounded up to powers of two
    CELLS: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One row of what `combine` multiplies with `u`; rows at points without compensation are not written.

    Grid: (T,).
    """
    row = tl.program_id(0)
    own_class = tl.load(row_class + row)
    if own_class < 0:
        return
    point = tl.load(class_point + own_class)
    which = tl.load(index + point).to(tl.int64)
    if which < 0:
        return
    rank = tl.arange(0, RANK)
    ranked = rank < R
    product = tl.zeros((DEPTH, RANK), tl.float32)
    for begin in range(0, H, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        deep = depth < H
        x = tl.load(hidden + row.to(tl.int64) * H + depth, mask=deep, other=0.0).to(tl.float32)
        at = a + (which * (H + 1) + depth)[:, None] * R + rank[None, :]
        product += x[:, None] * tl.load(at, mask=deep[:, None] & ranked[None, :], other=0.0)
    total = tl.sum(product, 0) + tl.load(a + (which * (H + 1) + H) * R + rank, mask=ranked, other=0.0)
    cells = tl.arange(0, SLOTS * CELLS)
    place, cell = cells // CELLS, cells % CELLS
    slot = row * K + place
    real = (place < K) & (cell < N)
    expert = tl.load(expert_ids + slot, mask=real, other=E)
    kept = tl.load(keep + slot * N + cell, mask=real, other=1)
    dropped = (expert < E) & (kept == 0)
    weight = tl.load(router_weights + slot, mask=dropped, other=0.0)
    at = c + ((which * E + expert) * N + cell)[:, None] * R + rank[None, :]
    gone = tl.load(at, mask=dropped[:, None] & ranked[None, :], other=0.0)
    total += tl.sum(weight[:, None] * gone, 0)
    tl.store(inner + row * R + rank, total, mask=ranked)
