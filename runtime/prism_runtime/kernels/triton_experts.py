# mypy: disable-error-code="no-untyped-def"
"""The Triton programs of a sub-expert layer: SwiGLU up, and down with the router's weight.

Both walk the block tables of `routing`. Weights are `ExpertWeights`: w1 [E, N, 2d, H], w2 [E, N, d, H], so one
sub-expert is one contiguous record of each. Sums are float32. Nothing here needs a GPU to be imported or compiled.
"""

import triton
import triton.language as tl

CLAMP_LIMIT, CLAMP_ALPHA = tl.constexpr(7.0), tl.constexpr(1.702)
"""Of the activation `activations.CLAMPED`; 0 below is `activations.SILU`."""


@triton.jit
def sub_expert_up(
    hidden,  # [T, H]
    w1,  # [E, N, 2d, H]
    b1,  # [E, N, 2d], or any pointer without BIAS
    keep,  # [S, N] int8 by slot; not read by sub-expert
    activated,  # out: [rows, N, d] by slot, [rows, d] by sub-expert
    slot,  # [rows] int32
    block_of,  # [B] int32: expert of a block by slot, sub-expert by sub-expert
    start,  # [B] int32
    end,  # [B] int32
    needed,  # [B, N] int8 by slot; not read by sub-expert
    live,  # [1] int32
    K: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile [ROWS, NEURONS] of one sub-expert's activations. Grid: (blocks, tiles of d, N or 1)."""
    block, tile, within = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if block >= tl.load(live):
        return
    if BY_SLOT:
        if tl.load(needed + block * N + within) == 0:
            return
        sub = tl.load(block_of + block).to(tl.int64) * N + within
    else:
        sub = tl.load(block_of + block).to(tl.int64)
    rows = tl.load(start + block) + tl.arange(0, ROWS)
    inside = rows < tl.load(end + block)
    neurons = tile * NEURONS + tl.arange(0, NEURONS)
    real = neurons < D
    slots = tl.load(slot + rows, mask=inside, other=0)
    tokens = (slots // K).to(tl.int64)
    weights = w1 + sub * (2 * D * H)
    gate = tl.zeros((ROWS, NEURONS), tl.float32)
    up = tl.zeros((ROWS, NEURONS), tl.float32)
    for begin in range(0, H, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        deep = depth < H
        x = tl.load(hidden + tokens[:, None] * H + depth[None, :], mask=inside[:, None] & deep[None, :], other=0.0)
        mask = deep[:, None] & real[None, :]
        g = tl.load(weights + neurons[None, :] * H + depth[:, None], mask=mask, other=0.0)
        u = tl.load(weights + (D + neurons)[None, :] * H + depth[:, None], mask=mask, other=0.0)
        if UPCAST:
            x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
        gate = tl.dot(x, g, gate, input_precision="ieee")
        up = tl.dot(x, u, up, input_precision="ieee")
    if BIAS:
        gate += tl.load(b1 + sub * (2 * D) + neurons, mask=real, other=0.0).to(tl.float32)[None, :]
        up += tl.load(b1 + sub * (2 * D) + D + neurons, mask=real, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 0:
        value = gate * tl.sigmoid(gate) * up
    else:
        gate = tl.minimum(gate, CLAMP_LIMIT)
        up = tl.minimum(tl.maximum(up, -CLAMP_LIMIT), CLAMP_LIMIT)
        value = (up + 1.0) * gate * tl.sigmoid(gate * CLAMP_ALPHA)
    out = rows.to(tl.int64)
    if BY_SLOT:
        kept = tl.load(keep + slots * N + within, mask=inside, other=0)
        value = tl.where(kept[:, None] != 0, value, 0.0)
        out = out * N + within
    target = activated + out[:, None] * D + neurons[None, :]
    tl.store(target, value.to(activated.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def sub_expert_down(
    activated,  # as sub_expert_up wrote it
    w2,  # [E, N, d, H]
    router_weights,  # [S] float32
    out,  # by slot: [S, H] float32, one row a slot; by sub-expert: [T, H] float32, added to
    slot,
    block_of,
    start,
    end,
    needed,
    live,
    K: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BY_SLOT: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of the output. Grid: (blocks, tiles of H).

    By slot the sub-experts of an expert are summed here, in their order, and no two programs write one element. By
    sub-expert their rows meet in `out` by atomic adds, in any order.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    if block >= tl.load(live):
        return
    rows = tl.load(start + block) + tl.arange(0, ROWS)
    inside = rows < tl.load(end + block)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < H
    slots = tl.load(slot + rows, mask=inside, other=0)
    first = tl.load(block_of + block).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BY_SLOT:
        for within in range(N):
            if tl.load(needed + block * N + within) != 0:
                total = _down_one(
                    total, activated, w2, rows.to(tl.int64) * N + within, first * N + within, inside, columns, real,
                    H, D, UPCAST, DEPTH,
                )  # fmt: skip
    else:
        total = _down_one(total, activated, w2, rows.to(tl.int64), first, inside, columns, real, H, D, UPCAST, DEPTH)
    total *= tl.load(router_weights + slots, mask=inside, other=0.0)[:, None]
    mask = inside[:, None] & real[None, :]
    if BY_SLOT:
        tl.store(out + slots.to(tl.int64)[:, None] * H + columns[None, :], total, mask=mask)
    else:
        tokens = (slots // K).to(tl.int64)
        tl.atomic_add(out + tokens[:, None] * H + columns[None, :], total, mask=mask, sem="relaxed")


@triton.jit
def _down_one(
    total,
    activated,
    w2,
    records,  # [ROWS] int64: which row of `activated`, in units of d
    sub,
    inside,
    columns,
    real,
    H: tl.constexpr,
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`total` plus one sub-expert's part of the tile."""
    for begin in range(0, D, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        deep = depth < D
        a = tl.load(activated + records[:, None] * D + depth[None, :], mask=inside[:, None] & deep[None, :], other=0.0)
        w = tl.load(
            w2 + (sub * D + depth)[:, None] * H + columns[None, :], mask=deep[:, None] & real[None, :], other=0.0
        )
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total
