# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 - an if of a compile-time constant decides whether the one inside is compiled at all
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
    first, last = tl.load(start + block), tl.load(end + block)
    if first >= last:
        return
    rows = first + tl.arange(0, ROWS)
    inside = rows < last
    slots = tl.load(slot + rows, mask=inside, other=0)
    sub = tl.load(block_of + block).to(tl.int64)
    if BY_SLOT:
        kept = tl.load(keep + slots * N + within, mask=inside, other=0)
        if tl.max(kept.to(tl.int32)) == 0:
            return
        sub = sub * N + within
    neurons = tile * NEURONS + tl.arange(0, NEURONS)
    real = neurons < D
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
        value = tl.where(kept[:, None] != 0, value, 0.0)
        out = out * N + within
    target = activated + out[:, None] * D + neurons[None, :]
    tl.store(target, value.to(activated.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def sub_expert_down(
    activated,  # as sub_expert_up wrote it
    w2,  # [E, N, d, H]
    router_weights,  # [S] float32
    keep,  # [S, N] int8 by slot; not read by sub-expert
    out,  # by slot: [S, H] float32, one row a slot that runs; by sub-expert: [T, H] float32, added to
    slot,
    block_of,
    start,
    end,
    K: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BY_SLOT: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CELLS: tl.constexpr,  # N rounded up to a power of two
):
    """One tile [ROWS, COLUMNS] of the output. Grid: (blocks, tiles of H).

    By slot the sub-experts of an expert are summed here, in their order, and no two programs write one element. By
    sub-expert their rows meet in `out` by atomic adds, in any order.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(start + block), tl.load(end + block)
    if first >= last:
        return
    rows = first + tl.arange(0, ROWS)
    inside = rows < last
    slots = tl.load(slot + rows, mask=inside, other=0)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < H
    base = tl.load(block_of + block).to(tl.int64)
    # The sub-experts that any row runs, as bits: one loop over their neurons, which the compiler can pipeline.
    pending, sub_experts = tl.full((), 1, tl.int64), 1
    if BY_SLOT:
        cells = tl.arange(0, CELLS)
        mask = inside[:, None] & (cells < N)[None, :]
        kept = tl.max(tl.load(keep + slots[:, None] * N + cells[None, :], mask=mask, other=0).to(tl.int32), 0)
        sub_experts = tl.sum(kept)
        pending = tl.sum(kept.to(tl.int64) << cells.to(tl.int64))
        base = base * N
    STEPS: tl.constexpr = (D + DEPTH - 1) // DEPTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(sub_experts * STEPS):
        within = 0
        record = rows.to(tl.int64)
        if BY_SLOT:
            within = _lowest_bit(pending)
            record = record * N + within
            pending = tl.where(step % STEPS == STEPS - 1, pending & (pending - 1), pending)
        depth = (step % STEPS) * DEPTH + tl.arange(0, DEPTH)
        deep = depth < D
        a = tl.load(activated + record[:, None] * D + depth[None, :], mask=inside[:, None] & deep[None, :], other=0.0)
        at = w2 + ((base + within) * D + depth)[:, None] * H + columns[None, :]
        w = tl.load(at, mask=deep[:, None] & real[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision="ieee")
    total *= tl.load(router_weights + slots, mask=inside, other=0.0)[:, None]
    mask = inside[:, None] & real[None, :]
    if BY_SLOT:
        tl.store(out + slots.to(tl.int64)[:, None] * H + columns[None, :], total, mask=mask)
    else:
        tokens = (slots // K).to(tl.int64)
        tl.atomic_add(out + tokens[:, None] * H + columns[None, :], total, mask=mask, sem="relaxed")


@triton.jit
def _lowest_bit(bits):
    """Index of the lowest set bit: the exponent of a power of two is exact in float32."""
    power = (bits & -bits).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def combine(
    summed,  # as sub_expert_down wrote it
    expert_ids,  # [T, K] int64
    router_weights,  # [T, K] float32
    keep,  # [T, K, N] int8
    b2,  # [E, H]; not read without BIAS
    row_class,  # [T] int32; this and the rest but `out` are not read without PLANNED
    class_point,  # [classes] int32
    mode,  # [P] int32
    outputs,  # [T, K, TILES] int32: gate outputs evaluated; not read without GATED
    index,  # [P] int32: which compensation a point has, -1 for none; this and the next not without COMPENSATED
    ranks,  # [C] int32: what is charged; r is the largest of them
    inner,  # [T, r] float32
    u,  # [C, r, H] float32
    ran,  # [] int64, added to, as the next
    routed,  # [] int64
    extra,  # [] float64
    spent,  # [P, 2] float64
    out,  # out: [T, H]
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BIAS: tl.constexpr,
    PLANNED: tl.constexpr,
    GATED: tl.constexpr,
    TOKEN: tl.constexpr,
    COMPENSATED: tl.constexpr,
    SLOTS: tl.constexpr,  # K, N, R and K TILES rounded up to powers of two
    CELLS: tl.constexpr,
    RANK: tl.constexpr,
    COUNTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one row: the sum over its slots, biases and compensation. Grid: (T, tiles of H).

    The first tile of a row charges the plan with all that the row ran and cost.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < H
    point, gated, which = 0, 0, tl.full((), -1, tl.int64)
    if PLANNED:
        own_class = tl.load(row_class + row)
        point = tl.load(class_point + tl.maximum(own_class, 0))
        if GATED:
            gated = tl.where((own_class >= 0) & (tl.load(mode + point) != 0), 1, 0)
            if COMPENSATED:
                which = tl.where(gated > 0, tl.load(index + point), -1).to(tl.int64)
    place, cells = tl.arange(0, SLOTS), tl.arange(0, CELLS)
    slot = (row * K + place).to(tl.int64)
    known = place < K
    expert = tl.load(expert_ids + slot, mask=known, other=E)
    at = keep + slot[:, None] * N + cells[None, :]
    kept = tl.load(at, mask=known[:, None] & (cells < N)[None, :], other=0).to(tl.int32)
    ours = known & (expert < E)
    runs = ours & (tl.max(kept, 1) > 0)
    if BY_SLOT:
        of_slot = summed + slot[:, None] * H + columns[None, :]
        total = tl.sum(tl.load(of_slot, mask=runs[:, None] & real[None, :], other=0.0), 0)
    else:
        total = tl.load(summed + row.to(tl.int64) * H + columns, mask=real, other=0.0)
    if BIAS:
        # Rows at gated points get the biases of all their experts: the points were fitted with them.
        adds = runs | (ours & (place < gated * K))
        weight = tl.load(router_weights + slot, mask=adds, other=0.0)
        of_expert = b2 + expert[:, None] * H + columns[None, :]
        bias = tl.load(of_expert, mask=adds[:, None] & real[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * bias, 0)
    if COMPENSATED:
        if which >= 0:
            rank = tl.arange(0, RANK)
            factor = tl.load(inner + row * R + rank, mask=rank < R, other=0.0)
            of_rank = u + (which * R + rank)[:, None] * H + columns[None, :]
            total += tl.sum(factor[:, None] * tl.load(of_rank, mask=(rank < R)[:, None] & real[None, :], other=0.0), 0)
    tl.store(out + row.to(tl.int64) * H + columns, total.to(out.dtype.element_ty), mask=real)
    if PLANNED:
        if (tile == 0) & (tl.load(row_class + row) >= 0):
            cells_run = tl.sum(tl.sum(kept, 1))
            cells_routed = tl.sum(ours.to(tl.int32)) * N
            tl.atomic_add(ran, cells_run.to(tl.int64), sem="relaxed")
            tl.atomic_add(routed, cells_routed.to(tl.int64), sem="relaxed")
            if GATED:
                if gated > 0:
                    counts = tl.arange(0, COUNTS)
                    cost = tl.sum(tl.load(outputs + row * K * TILES + counts, mask=counts < K * TILES, other=0))
                    cost = cost.to(tl.float64)
                    if TOKEN:
                        cost += 1.0
                    if COMPENSATED:
                        if which >= 0:
                            dropped = (cells_routed - cells_run).to(tl.float64)
                            cost += tl.load(ranks + which).to(tl.float64) * (2.0 + dropped / H)
                    cost /= 3 * D
                    tl.atomic_add(extra, cost, sem="relaxed")
                    tl.atomic_add(spent + 2 * point, cells_run.to(tl.float64) + cost, sem="relaxed")
                    tl.atomic_add(spent + 2 * point + 1, cells_routed.to(tl.float64), sem="relaxed")
