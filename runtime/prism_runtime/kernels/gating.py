"""The gate and the compensation of one layer, for the rows of a forward that stand at threshold and batch points."""

import torch
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer
from prism_runtime.kernels.plan import BATCH, PlanTensor
from prism_runtime.kernels.selection import floor_cells, gate_scores, keep_above, keep_highest, log_token_factor


def require_gate(gated: GatedLayer | None, residual_rms: Tensor | None) -> tuple[GatedLayer, Tensor]:
    """Both, for rows at points with thresholds. Raises ValueError if one is missing."""
    if gated is None or residual_rms is None:
        raise ValueError(
            "a row stands at a point with thresholds, and this layer has no gate; bind the artifact's gates"
        )
    return gated, residual_rms


def cells_to_run(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    layer: int,
    plan: PlanTensor,
    weights: ExpertWeights,
    gated: GatedLayer | None,
    residual_rms: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(cells that run [T, K, N], what compensation adds [T, H] or None) for rows at any points; charges the plan.

    For kernels that take any subset of cells. Arguments as `contract.SubExpertKernel` has them.
    """
    experts, sub_experts = weights.w1.shape[:2]
    counts = plan.row_counts(layer)
    ours = expert_ids < experts
    by_rank = counts if counts.shape[1] == 1 else counts.gather(1, ranks(router_weights))
    slot_count = torch.where(ours, by_rank, 0)
    plan.ran += slot_count.sum()
    plan.routed += (ours & (counts[:, :1] > 0)).sum() * sub_experts
    keep = torch.arange(sub_experts, device=hidden.device) < slot_count[..., None]
    if not plan.gated_rows:
        return keep, None
    gated, residual_rms = require_gate(gated, residual_rms)
    rows, chosen, added = choose_cells(hidden, expert_ids, router_weights, residual_rms, layer, plan, weights, gated)
    keep[rows] = chosen
    if added is None:
        return keep, None
    return keep, torch.zeros_like(hidden, dtype=torch.float32).index_copy_(0, rows, added)


def ranks(router_weights: Tensor) -> Tensor:
    """[T, K] -> [T, K] int64: 0 for a token's heaviest expert. Not every router returns its experts in that order."""
    return router_weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def choose_cells(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    residual_rms: Tensor,
    layer: int,
    plan: PlanTensor,
    weights: ExpertWeights,
    gated: GatedLayer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows [M], cells that run [M, K, N], what to add [M, H] or None), for threshold and batch points.

    Arguments as `contract.SubExpertKernel` has them. To add are the compensation, and the down projection's bias of
    experts of which no cell runs: it is no neuron's, costs nothing, and the points were fitted with it.

    Charges the plan with what runs and with what choosing and compensating cost: a gate output is H multiply-adds, a
    token's sensitivity H, a compensation of rank r 2 r H a token and r a dropped cell. Elementwise work is not counted.
    """
    gate = gated.gate
    experts, sub_experts, width = gate.weight.shape
    neurons = weights.w2.shape[2]
    rows, keeps, added = [], [], []
    for point, at in plan.gated_rows.items():
        valid = expert_ids[at] < experts
        x, router = hidden[at], torch.where(valid, router_weights[at].float(), 0)
        ids = expert_ids[at].clamp(max=experts - 1)
        log_scale = router.log() + log_token_factor(x, residual_rms[at], gate.token)[:, None]
        floor = floor_cells(router, valid, sub_experts)
        if plan.mode_of(point) == BATCH:
            scores, outputs = gate_scores(x, ids, log_scale, gate, None)
            keep = keep_highest(scores, floor, valid, plan.share_of(point, layer))
        else:
            tau = plan.threshold(point, layer)
            scores, outputs = gate_scores(x, ids, log_scale, gate, tau)
            keep = keep_above(scores, floor, valid, tau, plan.cap_of(point))
        rows.append(at)
        keeps.append(keep)

        multiply_adds = outputs.sum() * width
        if gate.token is not None:
            multiply_adds = multiply_adds + len(at) * width
        compensation = gated.compensation.get(point)
        extra = torch.zeros_like(x, dtype=torch.float32)
        if weights.b2 is not None:
            extra += silent_biases(ids, router, valid, keep, weights.b2)
        if compensation is not None:
            dropped = valid[..., None] & ~keep
            extra += compensate(x, ids, router, dropped, compensation)
            rank = compensation.u.shape[0]
            multiply_adds = multiply_adds + 2 * rank * width * len(at) + rank * dropped.sum()
        added.append(extra)
        plan.charge(point, keep.sum(), multiply_adds / (3 * width * neurons), valid.sum() * sub_experts)
    anything = weights.b2 is not None or any(point in gated.compensation for point in plan.gated_rows)
    return torch.cat(rows), torch.cat(keeps), torch.cat(added) if anything else None


def silent_biases(expert_ids: Tensor, router_weights: Tensor, valid: Tensor, keep: Tensor, b2: Tensor) -> Tensor:
    """[M, H] float32: the down projection's biases of experts of which no cell in `keep` [M, K, N] runs."""
    silent = valid & ~keep.any(-1)
    biases = b2.float()[expert_ids.clamp(max=len(b2) - 1)]
    return (biases * (router_weights * silent)[..., None]).sum(1)


def compensate(
    x: Tensor, expert_ids: Tensor, router_weights: Tensor, dropped: Tensor, compensation: CompensationWeights
) -> Tensor:
    """[M, H] float32: what the dropped cells [M, K, N] are expected to have added."""
    experts, sub_experts, rank = compensation.c.shape
    # Another rank's experts share an id here after the clamp; their cells are not among the dropped.
    mass = torch.zeros(len(x), experts, sub_experts, device=x.device)
    mass.scatter_add_(1, expert_ids[..., None].expand_as(dropped), dropped * router_weights[..., None])
    inner = mass.flatten(1) @ compensation.c.view(experts * sub_experts, rank)
    inner += torch.addmm(compensation.a[-1], x.float(), compensation.a[:-1])
    return inner @ compensation.u
