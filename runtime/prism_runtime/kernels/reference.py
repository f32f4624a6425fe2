"""Sub-expert MoE in plain torch: the definition the other kernels are compared with, and the CPU path.

Slots (one per row and routed expert) are sorted so that the rows of an expert are contiguous and, inside it, those with
more sub-experts come first. Sub-experts (a, b] of an expert then run for its first m rows: a contiguous slice of rows
times a contiguous slice of weights, one pair of products per distinct count in the batch and none per token.
"""

from itertools import pairwise

import torch
from torch import Tensor

from prism_runtime.kernels.contract import ExpertWeights
from prism_runtime.kernels.plan import PlanTensor


def sub_expert_moe(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    layer: int,
    plan: PlanTensor,
    weights: ExpertWeights,
) -> Tensor:
    """See `contract.SubExpertKernel`."""
    experts, sub_experts = weights.w1.shape[:2]
    top_k = expert_ids.shape[1]
    counts = plan.row_counts(layer)
    rows_alive = counts[:, :1] > 0
    if hidden.shape[0] != counts.shape[0]:
        raise ValueError(f"the plan has {counts.shape[0]} rows attached, the forward has {hidden.shape[0]}")

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


def ranks(router_weights: Tensor) -> Tensor:
    """[T, K] -> [T, K] int64: 0 for a token's heaviest expert. Not every router returns its experts in that order."""
    return router_weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _add_band(out: Tensor, rows: Tensor, expert: int, low: int, high: int, weights: ExpertWeights) -> None:
    """Add to `out` [m, H] what sub-experts low..high-1 of one expert give for `rows` [m, H], without router weight."""
    width, hidden = weights.w1.shape[2:]
    subs, neurons = high - low, width // 2
    w1 = weights.w1[expert, low:high].view(subs * width, hidden)
    if weights.b1 is None:
        projected = rows @ w1.t()
    else:
        projected = torch.addmm(weights.b1[expert, low:high].reshape(-1), rows, w1.t())
    gate, up = projected.view(-1, subs, 2, neurons).unbind(2)
    activated = weights.activation(gate, up).reshape(-1, subs * neurons)
    out.addmm_(activated, weights.w2[expert, low:high].view(subs * neurons, hidden))
