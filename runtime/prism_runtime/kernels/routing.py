"""From "which sub-experts run for which token" to tables that a grid of programs reads, on the device.

Shapes depend on T, K, N and E alone, and nothing waits for the device: a captured CUDA graph stays valid while budgets
change. A grid is launched at its upper bound, and programs of empty blocks, start = end, end at once.

Two orders of the same work:

by slot         rows are (token, routed expert) pairs, sorted by expert and, inside it, by how many sub-experts run. A
                block is some rows of one expert; its sub-experts share these rows. For decode, and wherever the order
                of sums must not change from run to run.
by sub-expert   rows are (token, routed expert, sub-expert) triples that run, sorted by sub-expert. A block is some rows
                of one sub-expert; no row is computed in vain. For prefill, where every sub-expert has many rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """Work by slot: S = T K slots in B blocks.

    slot    [S]     int32  index into the flattened [T, K], in the order of the blocks
    expert  [B]     int32
    start   [B]     int32  first row of the block; rows are positions in `slot`
    end     [B]     int32
    """

    slot: Tensor
    expert: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True, slots=True)
class SubExpertBlocks:
    """Work by sub-expert: R = T K N triples in B blocks.

    slot    [R]  int32  index into the flattened [T, K] of each row, in the order of the blocks
    sub     [B]  int32  sub-expert of the block, counted over all experts
    start, end    as in SlotBlocks
    """

    slot: Tensor
    sub: Tensor
    start: Tensor
    end: Tensor


def slot_blocks(expert_ids: Tensor, keep: Tensor, experts: int, rows: int) -> SlotBlocks:
    """Blocks of at most `rows` slots.

    expert_ids [T, K] int64; ids >= `experts` are another rank's and have no work here. keep [T, K, N] bool.
    """
    tokens, top_k, sub_experts = keep.shape
    slots = tokens * top_k
    keep = keep.reshape(slots, sub_experts)
    running = keep.sum(1)
    expert = torch.where((expert_ids.reshape(-1) < experts) & (running > 0), expert_ids.reshape(-1), experts)
    order = torch.argsort(expert * (sub_experts + 1) + sub_experts - running, stable=True)
    block_of, start, end = _blocks(expert, experts, rows, slots)
    return SlotBlocks(order.int(), block_of.int(), start.int(), end.int())


def sub_expert_blocks(expert_ids: Tensor, keep: Tensor, experts: int, rows: int) -> SubExpertBlocks:
    """Blocks of at most `rows` rows of one sub-expert; arguments as of `slot_blocks`."""
    tokens, top_k, sub_experts = keep.shape
    total, groups = tokens * top_k * sub_experts, experts * sub_experts
    within = torch.arange(sub_experts, device=keep.device)
    runs = keep & (expert_ids < experts)[..., None]
    sub = torch.where(runs, expert_ids[..., None] * sub_experts + within, groups).reshape(-1)
    order = torch.argsort(sub, stable=True)
    block_of, start, end = _blocks(sub, groups, rows, total)
    return SubExpertBlocks((order // sub_experts).int(), block_of.int(), start.int(), end.int())


def _blocks(group: Tensor, groups: int, rows: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """(group, start, end of every block) for rows sorted by `group`.

    Rows of group `groups` have no work. The tables are as long as the most blocks there can be; those beyond the live
    ones are empty and lie behind all rows.
    """
    device = group.device
    count = torch.zeros(groups + 1, dtype=torch.int64, device=device)
    count = count.scatter_add_(0, group, torch.ones_like(group))[:groups]
    offset = count.cumsum(0) - count
    blocks = (count + rows - 1) // rows
    upto = blocks.cumsum(0)
    block = torch.arange(min(groups, total) + total // rows, device=device)
    block_of = torch.searchsorted(upto, block, right=True)
    live = block_of < groups
    block_of = block_of.clamp(max=groups - 1)
    start = offset[block_of] + (block - (upto - blocks)[block_of]) * rows
    end = torch.minimum(start + rows, (offset + count)[block_of])
    return block_of, torch.where(live, start, total), torch.where(live, end, total)
