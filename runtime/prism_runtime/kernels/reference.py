"""Sub-expert MoE in plain torch: the definition the other kernels are compared with, and the CPU path.

Prefix points: slots (one per row and routed expert) are sorted so that the rows of an expert are contiguous and, inside
it, those with more sub-experts come first. Sub-experts (a, b] of an expert then run for its first m rows: a contiguous
slice of rows times a contiguous slice of weights, one pair of products per distinct count in the batch and none per
token.

Threshold and batch points: any subset may run. Slots are sorted by expert; a run of neighbouring sub-experts that the
same rows chose is one pair of products over those rows. Where launching them would cost more than it saves, the whole
expert runs for its rows and what was not chosen is masked.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from prism_runtime.kernels.contract import ExpertWeights, GatedLayer
from prism_runtime.kernels.gating import choose_cells, ranks, require_gate
from prism_runtime.kernels.plan import PlanTensor

LAUNCH_MULTIPLY_ADDS = 500_000
"""What the fixed cost of one more block of products would buy: about 10 us at 50 G multiply-adds a second, one core."""

TOGETHER_VALUES = 1 << 20
"""Projections of so many values are made before any is activated: more would not stay in a core's cache."""

FEW_SLOTS = 512
"""Slots of a decode step; so many are sorted on the host in a quarter of a millisecond."""

Span = tuple[int, int, int]
"""(expert, first row, row behind the last): rows of one expert in the sorted order."""

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
    counts = plan.row_counts(layer)
    by_rank = None if counts.shape[1] == 1 else ranks(router_weights)
    sort = _sorted_on_host if expert_ids.numel() <= FEW_SLOTS else _sorted
    order, rows_with_at_least, ran, routed = sort(expert_ids, counts, by_rank, experts, sub_experts)
    plan.ran += ran
    plan.routed += routed

    token = order // expert_ids.shape[1]
    rows = hidden[token]
    out = torch.zeros_like(rows)
    starts = list(accumulate((at_least[sub_experts] for at_least in rows_with_at_least), initial=0))
    for low, high in pairwise((0, *plan.levels(layer))):
        spans = [
            (expert, start, start + at_least[sub_experts - high])
            for expert, (start, at_least) in enumerate(zip(starts, rows_with_at_least, strict=False))
            if at_least[sub_experts - high]
        ]
        for some in _together(spans, (high - low) * weights.w1.shape[2]):
            _add_bands(out, rows, some, low, high, weights)

    out *= router_weights.reshape(-1)[order, None].to(out.dtype)
    return torch.zeros_like(hidden).index_add_(0, token, out)


Sorted = tuple[Tensor, list[list[int]], Tensor | int, Tensor | int]
"""Slots [T K] int64 by expert and, inside it, those with more sub-experts first; by expert the rows that run N or more,
N - 1 or more, ..., 0 or more sub-experts; sub-experts that run, and that were routed."""


def _sorted(expert_ids: Tensor, counts: Tensor, by_rank: Tensor | None, experts: int, sub_experts: int) -> Sorted:
    ours = expert_ids < experts
    slot_count = torch.where(ours, counts if by_rank is None else counts.gather(1, by_rank), 0)
    key = (expert_ids.clamp(max=experts - 1) * (sub_experts + 1) + (sub_experts - slot_count)).reshape(-1)
    key, order = torch.sort(key, stable=True)
    tally = torch.bincount(key, minlength=experts * (sub_experts + 1)).view(experts, sub_experts + 1)
    routed = (ours & (counts[:, :1] > 0)).sum() * sub_experts
    return order, tally.cumsum(1).tolist(), slot_count.sum(), routed


def _sorted_on_host(
    expert_ids: Tensor, counts: Tensor, by_rank: Tensor | None, experts: int, sub_experts: int
) -> Sorted:
    """The same of few slots, without tensors.

    After a layer's weights have gone through the caches, starting any operation takes as long as many of these steps.
    """
    rank = None if by_rank is None else by_rank.tolist()
    keys, ran, routed = [], 0, 0
    tally = [[0] * (sub_experts + 1) for _ in range(experts)]
    for row, (chosen, count) in enumerate(zip(expert_ids.tolist(), counts.tolist(), strict=True)):
        for place, expert in enumerate(chosen):
            number = 0
            if expert < experts:
                number = count[rank[row][place]] if rank else count[0]
                routed += sub_experts if count[0] else 0
            ran += number
            expert = min(expert, experts - 1)
            tally[expert][sub_experts - number] += 1
            keys.append(expert * (sub_experts + 1) + sub_experts - number)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    at_least = [list(accumulate(numbers)) for numbers in tally]
    return torch.tensor(order, dtype=torch.int64, device=expert_ids.device), at_least, ran, routed


def _together(spans: list[Span], width: int) -> Iterator[list[Span]]:
    """Spans whose projections, `width` values a row, fit in TOGETHER_VALUES; a longer one comes alone."""
    some: list[Span] = []
    room = TOGETHER_VALUES // width
    for span in spans:
        rows = span[2] - span[1]
        if some and rows > room:
            yield some
            some, room = [], TOGETHER_VALUES // width
        some.append(span)
        room -= rows
    if some:
        yield some


def _add_bands(out: Tensor, rows: Tensor, spans: list[Span], low: int, high: int, weights: ExpertWeights) -> None:
    """Add to each span's rows of `out` [S, H] what sub-experts low..high-1 of its expert give for those of `rows`.

    Without router weight. With `low` 0 they are written, not added to, and have the down projection's bias. An expert
    costs two products and little else: the rest is done for all spans at once.
    """
    subs, neurons = high - low, weights.w2.shape[2]
    up = weights.w1[:, low:high].flatten(1, 2).transpose(1, 2)
    down = weights.w2[:, low:high].flatten(1, 2)
    lengths = [stop - start for _, start, stop in spans]
    projected = rows.new_empty(sum(lengths), up.shape[2])
    for (expert, _, _), inputs, to in zip(spans, _pieces(rows, spans), projected.split(lengths), strict=True):
        if weights.b1 is None:
            torch.mm(inputs, up[expert], out=to)
        else:
            torch.addmm(weights.b1[expert, low:high].flatten(), inputs, up[expert], out=to)
    activated = weights.activation(*projected.view(-1, subs, 2, neurons).unbind(2)).reshape(-1, subs * neurons)
    for (expert, _, _), inputs, to in zip(spans, activated.split(lengths), _pieces(out, spans), strict=True):
        if low:
            to.addmm_(inputs, down[expert])
        elif weights.b2 is None:
            torch.mm(inputs, down[expert], out=to)
        else:
            torch.addmm(weights.b2[expert], inputs, down[expert], out=to)


def _pieces(rows: Tensor, spans: list[Span]) -> tuple[Tensor, ...]:
    """The spans' rows, as views."""
    edges = [0, *(edge for _, *span in spans for edge in span), len(rows)]
    return rows.split([stop - start for start, stop in pairwise(edges)])[1::2]


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
