# mypy: disable-error-code="no-untyped-def"
"""The Triton program behind `routing.slot_blocks` for few rows: one launch instead of two dozen."""

import triton
import triton.language as tl


@triton.jit
def place_slots(
    expert_ids,  # [S] int64
    keep,  # [S, N] int8
    slot,  # out: [S] int32
    expert,  # out: [B] int32, as below: `routing.SlotBlocks`, with empty blocks between those that have work
    start,
    end,
    S: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    DENSE: tl.constexpr,
    CELLS: tl.constexpr,  # N rounded up to a power of two
    HERE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Where HERE slots stand in the order of the blocks, found by counting who comes before. Grid: (tiles of S,).

    Without DENSE there is a block a slot, and every entry is written. With it a block's place is its expert and how
    many times ROWS fits into its first row, which no other block has: B = E + S / ROWS + 1, and `start` and `end` hold
    zeros before.
    """
    here = tl.program_id(0) * HERE + tl.arange(0, HERE)
    real = here < S
    own_expert, own_key = _key(expert_ids, keep, here, S, E, N, CELLS)
    rank = tl.zeros((HERE,), tl.int32)
    before = tl.zeros((HERE,), tl.int32)
    same = tl.zeros((HERE,), tl.int32)
    for begin in range(0, S, STEP):
        other = begin + tl.arange(0, STEP)
        its_expert, its_key = _key(expert_ids, keep, other, S, E, N, CELLS)
        exists = (other < S)[None, :]
        ties = (its_key[None, :] == own_key[:, None]) & (other[None, :] < here[:, None])
        first = exists & ((its_key[None, :] < own_key[:, None]) | ties)
        rank += tl.sum(first.to(tl.int32), 1)
        before += tl.sum((exists & (its_expert[None, :] < own_expert[:, None])).to(tl.int32), 1)
        same += tl.sum((exists & (its_expert[None, :] == own_expert[:, None])).to(tl.int32), 1)
    opens = (own_expert < E) & ((rank - before) % ROWS == 0)
    last = tl.minimum(rank + ROWS, before + same)
    tl.store(slot + rank, here, mask=real)
    if DENSE:
        block = own_expert + rank // ROWS
        real = real & opens
    else:
        block = rank
        last = tl.where(opens, last, rank)
    tl.store(expert + block, own_expert, mask=real)
    tl.store(start + block, rank, mask=real)
    tl.store(end + block, last, mask=real)


@triton.jit
def _key(expert_ids, keep, slots, S: tl.constexpr, E: tl.constexpr, N: tl.constexpr, CELLS: tl.constexpr):
    """(expert, or E where nothing runs; key to sort by: the expert, then most sub-experts first)."""
    real = slots < S
    cells = tl.arange(0, CELLS)
    at = keep + slots[:, None] * N + cells[None, :]
    running = tl.sum(tl.load(at, mask=real[:, None] & (cells < N)[None, :], other=0).to(tl.int32), 1)
    expert = tl.load(expert_ids + slots, mask=real, other=E).to(tl.int32)
    expert = tl.where((expert < E) & (running > 0), expert, E)
    return expert, expert * (N + 1) + N - running
