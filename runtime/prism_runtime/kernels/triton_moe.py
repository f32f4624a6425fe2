"""The sub-expert layer on a GPU: routing tables, then the two programs of `triton_experts`.

`run_kept` can be captured in a CUDA graph: its shapes depend on the number of rows alone and nothing waits for the
device, so a graph goes on to be right when `keep` changes where it lies.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from prism_runtime.kernels.activations import recognise
from prism_runtime.kernels.contract import ExpertWeights, GatedLayer
from prism_runtime.kernels.gating import cells_to_run
from prism_runtime.kernels.plan import PlanTensor
from prism_runtime.kernels.routing import slot_blocks, sub_expert_blocks
from prism_runtime.kernels.triton_experts import sub_expert_down, sub_expert_up

DECODE_ROWS, PREFILL_ROWS = 16, 64
"""Rows of a tile. 16 is the least that tensor cores take; 128 spills registers on sm_80."""
PREFILL_FROM_TOKENS = 256
"""From here on an expert has rows enough for tiles of 64."""
NEURONS, COLUMNS, DEPTH = 64, 64, 64
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
"""Fusion is said, because its default changes with Triton 3.10."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a layer is cut.

    rows        rows of a tile
    by_slot     the two orders of work of `routing`; by slot the result is the same in every run, bit for bit
    """

    rows: int
    by_slot: bool


def tiling(tokens: int, deterministic: bool = True) -> Tiling:
    """The tiling for a forward of so many tokens."""
    prefill = tokens >= PREFILL_FROM_TOKENS
    return Tiling(PREFILL_ROWS if prefill else DECODE_ROWS, by_slot=deterministic or not prefill)


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
    keep, added = cells_to_run(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    out = run_kept(hidden, expert_ids, router_weights, keep, weights, tiling(len(hidden)))
    return out if added is None else out + added.to(out.dtype)


def run_kept(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, keep: Tensor, weights: ExpertWeights, how: Tiling
) -> Tensor:
    """[T, H]: the weighted sum of the sub-experts with `keep` [T, K, N] set, whatever chose them.

    The down projection's bias is added for every expert of which any sub-expert runs. Raises UnsupportedActivation.
    """
    (tokens, top_k), (experts, sub_experts, doubled, width) = expert_ids.shape, weights.w1.shape
    neurons = doubled // 2
    shape = {"K": top_k, "N": sub_experts, "H": width, "D": neurons, "BY_SLOT": how.by_slot, "ROWS": how.rows}
    shape |= {"UPCAST": _interpreted(), "DEPTH": _tile(DEPTH, width)}
    scale = router_weights.reshape(-1).float().contiguous()
    hidden = hidden.contiguous()
    table: Any
    if how.by_slot:
        table = slot_blocks(expert_ids, keep, experts, how.rows)
        block_of, needed, mask = table.expert, table.needed, keep.to(torch.int8).contiguous()
        records, within = len(table.slot) * sub_experts, sub_experts
        out = torch.zeros(tokens * top_k, width, dtype=torch.float32, device=hidden.device)
    else:
        table = sub_expert_blocks(expert_ids, keep, experts, how.rows)
        block_of, needed, mask = table.sub, table.live, table.live
        records, within = len(table.slot), 1
        out = torch.zeros(tokens, width, dtype=torch.float32, device=hidden.device)
    activated = torch.empty(records, neurons, dtype=hidden.dtype, device=hidden.device)
    blocks, bias = len(block_of), weights.b1 if weights.b1 is not None else weights.w1
    tables = (table.slot, block_of, table.start, table.end, needed, table.live)
    tile = _tile(NEURONS, neurons)
    _launch(
        sub_expert_up,
        (blocks, triton.cdiv(neurons, tile), within),
        (hidden, weights.w1, bias, mask, activated, *tables),
        shape | {"BIAS": weights.b1 is not None, "ACTIVATION": recognise(weights.activation), "NEURONS": tile},
    )
    tile = _tile(COLUMNS, width)
    _launch(
        sub_expert_down,
        (blocks, triton.cdiv(width, tile)),
        (activated, weights.w2, scale, out, *tables),
        shape | {"COLUMNS": tile, "DEPTH": _tile(DEPTH, neurons)},
    )
    if how.by_slot:
        out = out.view(tokens, top_k, width).sum(1)
    if weights.b2 is not None:
        running = keep.any(-1) & (expert_ids < experts)
        bias_of = weights.b2.float()[expert_ids.clamp(max=experts - 1)]
        out += (bias_of * (router_weights.float() * running)[..., None]).sum(1)
    return out.to(hidden.dtype)


def _tile(most: int, size: int) -> int:
    """A power of two, at least 16: what a tile's side may be."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _launch(program: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], constants: dict[str, Any]) -> None:
    options: dict[str, Any] = {} if _interpreted() else OPTIONS
    program[grid](*tensors, **constants, **options)
