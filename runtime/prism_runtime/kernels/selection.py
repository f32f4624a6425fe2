"""From rows to the cells that run: predicted contributions, and the three ways to cut them. Pure.

A cell is one sub-expert of one routed expert of one row. Its score is the logarithm of what it is predicted to add:
router weight x token factor x norm of its output. The token factor of a row depends on that row alone.
"""

import torch
from torch import Tensor

from prism_runtime.kernels.contract import GateWeights

SENSITIVITY_EXPONENT = 0.25
SENSITIVITY_LIMIT = 8.0
RMS_FLOOR = 1e-6
"""Keeps the logarithm finite for a row of zeros."""


def log_token_factor(hidden: Tensor, residual_rms: Tensor, token: Tensor | None) -> Tensor:
    """[T] float32: how much one unit of output error matters at a token, up to a constant.

    The norm after the block divides by the residual's size, hence -log R; `token` [H + 3] adds a fitted sensitivity.
    """
    rms = residual_rms.clamp(min=RMS_FLOOR)
    if token is None:
        return -rms.log()
    width = hidden.shape[1]
    fitted = hidden.float() @ token[:width] + rms * token[width] + rms.log() * token[width + 1] + token[width + 2]
    return (SENSITIVITY_EXPONENT * fitted).clamp(-SENSITIVITY_LIMIT, SENSITIVITY_LIMIT) - rms.log()


def gate_scores(
    hidden: Tensor, expert_ids: Tensor, log_scale: Tensor, gate: GateWeights, tau: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores [T, K, N] float32 of every cell, and how many gate outputs [T] int64 they took.

    expert_ids  [T, K]  below E
    log_scale   [T, K]  log router weight + log token factor; cells of a slot with -inf score -inf unevaluated
    tau         []      log threshold that will cut the scores. With it and the gate's kappa, cells that are certain to
                        lie on one side get the mean prediction; None evaluates every cell
    """
    experts, sub_experts = gate.bias.shape
    rows, top_k = expert_ids.shape
    prediction = gate.mean[expert_ids]
    if tau is None or gate.kappa is None:
        open_cells = (log_scale != -torch.inf)[:, :, None].expand(-1, -1, sub_experts)
    else:
        distance = (tau - log_scale[:, :, None] - prediction).abs()
        open_cells = distance < gate.kappa * gate.deviation[expert_ids]
    slots = open_cells.any(-1).flatten().nonzero().flatten()
    slot_expert, order = expert_ids.flatten()[slots].sort(stable=True)
    slots = slots[order]
    values = torch.empty(len(slots), sub_experts, device=hidden.device)
    inputs = hidden[slots // top_k].float()
    start = 0
    for expert, length in enumerate(torch.bincount(slot_expert, minlength=experts).tolist()):
        if length:
            block = slice(start, start + length)
            torch.addmm(gate.bias[expert], inputs[block], gate.weight[expert].t(), out=values[block])
            start += length
    evaluated = torch.zeros(rows * top_k, sub_experts, device=hidden.device).index_copy_(0, slots, values)
    prediction = torch.where(open_cells, evaluated.view_as(prediction), prediction)
    return prediction + log_scale[:, :, None], open_cells.sum((1, 2))


def floor_cells(router_weights: Tensor, valid: Tensor, sub_experts: int) -> Tensor:
    """[T, K, N] bool: the cell that always runs, the first sub-expert of the row's heaviest valid expert.

    Without it a row whose scores all lie below the threshold would lose its whole block.
    """
    top = torch.where(valid, router_weights.float(), -torch.inf).argmax(1, keepdim=True)
    cells = torch.zeros(*router_weights.shape, sub_experts, dtype=torch.bool, device=router_weights.device)
    cells[..., 0].scatter_(1, top, True)
    return cells & valid[..., None]


def keep_above(scores: Tensor, floor: Tensor, valid: Tensor, tau: Tensor, cap: int) -> Tensor:
    """[T, K, N] bool: cells whose score reaches `tau` and the floor; at most `cap` a row, the highest, if it is not 0.

    Every row is cut for itself. A lower threshold keeps a superset of the same scores.
    """
    keep = ((scores >= tau) & valid[..., None]) | floor
    if not cap:
        return keep
    ranked = torch.where(floor, torch.inf, torch.where(keep, scores, -torch.inf)).flatten(1)
    place = ranked.argsort(dim=1, descending=True, stable=True).argsort(1).view_as(scores)
    return keep & (place < cap)


def keep_highest(scores: Tensor, floor: Tensor, valid: Tensor, share: float) -> Tensor:
    """[T, K, N] bool: the `share` of all valid cells of the batch with the highest scores, the floor first.

    Their number is exact, round(share x cells), unless the floor alone has more. Ties go to the lower row and slot.
    """
    cells = int(valid.sum()) * scores.shape[2]
    number = max(round(share * cells), int(floor.sum()))
    ranked = torch.where(floor, torch.inf, torch.where(valid[..., None], scores, -torch.inf)).flatten()
    keep = torch.zeros_like(ranked, dtype=torch.bool)
    keep[ranked.argsort(descending=True, stable=True)[:number]] = True
    return keep.view_as(scores)
