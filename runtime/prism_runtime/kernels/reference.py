"""Sub-expert MoE in plain torch: the definition the other kernels are compared with, and the CPU path.

Prefix points: slots (one per row and routed expert) are sorted so that the rows of an expert are contiguous and, inside
it, those with more sub-experts come first. Sub-experts (a, b] of an expert then run for its first m rows: a contiguous
slice of rows times a contiguous slice of weights, one pair of products per distinct count in the batch and none per
token.

Threshold and batch points: any subset may run. Slots are sorted by expert; a run of neighbouring sub-experts that the
same rows chose is one pair of products over those rows. Where launching them would cost more than it saves, the whole
expert runs for its rows and what was not chosen is masked.
"""

from itertools import pairwise

import torch
from torch import Tensor

from prism_runtime.kernels.contract import ExpertWeights, GatedLayer
from prism_runtime.kernels.gating import choose_cells, ranks, require_gate
from prism_runtime.kernels.plan import PlanTensor

LAUNCH_MULTIPLY_ADDS = 500_000
"""What the fixed cost of one more block of products would buy: about 10 us at 50 G multiply-adds a second, one core."""

WEIGHT_BOUND_ROWS = 8
"""A product with fewer rows takes as long as with these: reading the weights bounds it."""


def sub_expert_moe(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    layer: int,
    plan: PlanTensor,
    weights: ExpertWeights,
    gated: GatedLayer | None = None,
    residual_rms: Tensor | None = None,
) -> Tensor:
    """See `contract.SubExpertKernel`."""
    attached = len(plan.row_class)
    if hidden.shape[0] != attached:
        raise ValueError(f"the plan has {attached} rows attached, the forward has {hidden.shape[0]}")
    if not plan.gated_rows:
        return _run_prefixes(hidden, expert_ids, router_weights, layer, plan, weights)
    gated, residual_rms = require_gate(gated, residual_rms)
    if plan.levels(layer):
        out = _run_prefixes(hidden, expert_ids, router_weights, layer, plan, weights)
    else:
        out = torch.zeros_like(hidden)
    rows, keep, added = choose_cells(hidden, expert_ids, router_weights, residual_rms, layer, plan, weights, gated)
    chosen = _run_cells(hidden[rows], expert_ids[rows], router_weights[rows], keep, weights)
    if added is not None:
        chosen += added.to(chosen.dtype)
    return out.index_add_(0, rows, chosen)


# -- prefix points -----------------------------------------------------------------------------------------------


def _run_prefixes(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, layer: int, plan: PlanTensor, weights: ExpertWeights
) -> Tensor:
    experts, sub_experts = weights.w1.shape[:2]
    top_k = expert_ids.shape[1]
    counts = plan.row_counts(layer)
    rows_alive = counts[:, :1] > 0

    ours = expert_ids < experts
    slot_count = torch.where(ours, counts if counts.shape[1] == 1 else counts.gather(1, ranks(router_weights)), 0)
    plan.ran += slot_count.sum()
    plan.routed += (ours & rows_alive).sum() * sub_experts

    key = (expert_ids.clamp(max=experts - 1) * (sub_experts + 1) + (sub_experts - slot_count)).reshape(-1)
    key, order = torch.sort(key)
    tally = torch.bincount(key, minlength=experts * (sub_experts + 1)).view(experts, sub_experts + 1)
    rows_with_at_least = tally.cumsum(1).tolist()  # [e][N - n]: rows of expert e that run n or more sub-experts
    bands = list(pairwise((0, *plan.levels(layer))))

    token = order // top_k
    rows = hidden[token]
    out = torch.zeros_like(rows)
    start = 0
    for expert, at_least in enumerate(rows_with_at_least):
        for low, high in bands:
            if stop := at_least[sub_experts - high]:
                block = out[start : start + stop]
                _add_band(block, rows[start : start + stop], expert, low, high, weights)
                if low == 0 and weights.b2 is not None:
                    block += weights.b2[expert]
        start += at_least[sub_experts]

    out *= router_weights.reshape(-1)[order, None].to(out.dtype)
    return torch.zeros_like(hidden).index_add_(0, token, out)


# -- threshold and batch points ----------------------------------------------------------------------------------


def _run_cells(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, keep: Tensor, weights: ExpertWeights
) -> Tensor:
    """[M, H]: the experts' outputs for `hidden` [M, H], of the cells in `keep` [M, K, N] alone.

    The down projection's bias belongs to a routed expert as a whole; here it is added if one of its cells runs.
    """
    experts, sub_experts = weights.w1.shape[:2]
    top_k = expert_ids.shape[1]
    slots = keep.any(-1).flatten().nonzero().flatten()
    slot_expert, order = expert_ids.flatten()[slots].sort(stable=True)
    slots = slots[order]
    keep = keep.flatten(0, 1)[slots]
    token = slots // top_k
    rows = hidden[token]
    out = torch.zeros_like(rows)

    spread = slot_expert[:, None]
    cells = torch.zeros(experts, sub_experts, dtype=torch.int64, device=hidden.device)
    cells.scatter_add_(0, spread.expand_as(keep), keep.long())
    differs = torch.zeros(experts, sub_experts - 1, dtype=torch.int64, device=hidden.device)
    change = keep[:, 1:] != keep[:, :-1]
    differs.scatter_add_(0, spread.expand_as(change), change.long())
    lengths = torch.bincount(slot_expert, minlength=experts).tolist()
    start = 0
    for expert, (length, tally, edges) in enumerate(zip(lengths, cells.tolist(), differs.tolist(), strict=True)):
        if length:
            block = slice(start, start + length)
            _add_cells(out[block], rows[block], keep[block], expert, _runs(tally, edges), tally, weights)
            if weights.b2 is not None:
                out[block] += weights.b2[expert]
            start += length
    out *= router_weights.reshape(-1)[slots, None].to(out.dtype)
    return torch.zeros_like(hidden).index_add_(0, token, out)


def _runs(tally: list[int], edges: list[int]) -> list[tuple[int, int]]:
    """[low, high) of neighbouring sub-experts that the same rows chose, without those that nobody chose."""
    cuts = [0, *(n + 1 for n, differs in enumerate(edges) if differs), len(tally)]
    return [(low, high) for low, high in pairwise(cuts) if tally[low]]


def _add_cells(
    out: Tensor,
    rows: Tensor,
    keep: Tensor,
    expert: int,
    runs: list[tuple[int, int]],
    tally: list[int],
    weights: ExpertWeights,
) -> None:
    """Add to `out` [m, H] what the kept cells [m, N] of one expert give for `rows` [m, H], without router weight."""
    length, (low, high) = len(rows), (runs[0][0], runs[-1][1])
    neurons, width = weights.w2.shape[2:]
    whole = (high - low) * max(length, WEIGHT_BOUND_ROWS)
    apart = sum((end - begin) * max(tally[begin], WEIGHT_BOUND_ROWS) for begin, end in runs)
    if (whole - apart) * 3 * neurons * width < (len(runs) - 1) * LAUNCH_MULTIPLY_ADDS:
        _add_band(out, rows, expert, low, high, weights, keep[:, low:high])
        return
    for low, high in runs:
        if tally[low] == length:
            _add_band(out, rows, expert, low, high, weights)
        else:
            at = keep[:, low].nonzero().flatten()
            part = torch.zeros(len(at), width, dtype=out.dtype, device=out.device)
            _add_band(part, rows[at], expert, low, high, weights)
            out.index_add_(0, at, part)


# -- both --------------------------------------------------------------------------------------------------------


def _add_band(
    out: Tensor,
    rows: Tensor,
    expert: int,
    low: int,
    high: int,
    weights: ExpertWeights,
    keep: Tensor | None = None,
) -> None:
    """Add to `out` [m, H] what sub-experts low..high-1 of one expert give for `rows` [m, H], without router weight.

    keep  [m, high - low] bool: only these cells, or None for all
    """
    width, hidden = weights.w1.shape[2:]
    subs, neurons = high - low, width // 2
    w1 = weights.w1[expert, low:high].view(subs * width, hidden)
    if weights.b1 is None:
        projected = rows @ w1.t()
    else:
        projected = torch.addmm(weights.b1[expert, low:high].reshape(-1), rows, w1.t())
    gate, up = projected.view(-1, subs, 2, neurons).unbind(2)
    activated = weights.activation(gate, up)
    if keep is not None:
        activated = activated.masked_fill(~keep[..., None], 0)
    out.addmm_(activated.reshape(-1, subs * neurons), weights.w2[expert, low:high].view(subs * neurons, hidden))
