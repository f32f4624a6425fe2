"""The sub-expert layer on a CPU: compiled C for few rows, the torch reference for many, or where there is no compiler.

With few rows an expert, as in decode, time goes into streaming weights and into starting torch operations; the C does
the first in one pass and needs none of the second. With many rows, as in prefill, torch's matrix products win.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prism_runtime import native
from prism_runtime.kernels import cpu_gating, reference
from prism_runtime.kernels.activations import UnsupportedActivation, recognise
from prism_runtime.kernels.contract import Activation, ExpertWeights, GatedLayer
from prism_runtime.kernels.plan import PlanTensor

SOURCE = Path(__file__).with_name("cpu_experts.c")
FLAGS = ("-fopenmp", "-Wno-psabi")
MOST_ROWS_AN_EXPERT = 12
"""Above this many rows an expert, on average, torch's matrix products read each weight for more rows at once."""
LANES = 16


class _Shape(ctypes.Structure):
    """`shape` of cpu_experts.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("tokens", "top_k", "experts", "sub_experts", "neurons", "hidden"),
            *("bfloat16", "activation", "threads"),
        )
    )


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
    if not _fits(expert_ids, weights):
        return reference.sub_expert_moe(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    keep, added = cpu_gating.cells_to_run(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    out = run_kept(hidden, expert_ids, router_weights, keep, weights)
    return out if added is None else out + added.to(out.dtype)


def available() -> bool:
    """Whether the C could be compiled here."""
    return _library() is not None and cpu_gating.available()


def run_kept(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, keep: Tensor, weights: ExpertWeights
) -> Tensor:
    """[T, H]: the weighted sum of the sub-experts with `keep` [T, K, N] set, whatever chose them.

    Weights are float32 or bfloat16, H a multiple of 16. A row gives the same bits in any company. Uses as many threads
    as torch. Raises MemoryError.
    """
    library = _library()
    assert library is not None, "callers ask `available` first"
    (tokens, top_k), (experts, sub_experts, doubled, width) = expert_ids.shape, weights.w1.shape
    shape = _Shape(
        *(tokens, top_k, experts, sub_experts, doubled // 2, width),
        *(weights.w1.dtype == torch.bfloat16, recognise(weights.activation), torch.get_num_threads()),
    )
    by_slot = torch.zeros(tokens, top_k, width)
    inputs = (hidden.float(), expert_ids.long(), keep, weights.w1, weights.w2, weights.b1, weights.b2)
    held = [None if tensor is None else tensor.contiguous() for tensor in inputs]  # alive until the call returns
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in held]
    if library.prism_experts(ctypes.byref(shape), *pointers, ctypes.c_void_p(by_slot.data_ptr())):
        raise MemoryError(f"no memory to route {tokens * top_k} slots to experts")
    return torch.einsum("tkh,tk->th", by_slot, router_weights.float()).to(hidden.dtype)


@cache
def _library() -> ctypes.CDLL | None:
    return native.library(SOURCE, FLAGS)


def _fits(expert_ids: Tensor, weights: ExpertWeights) -> bool:
    """Whether the C can run this layer and is the faster way."""
    experts, _, _, width = weights.w1.shape
    return (
        expert_ids.numel() <= MOST_ROWS_AN_EXPERT * experts
        and weights.w1.dtype in (torch.float32, torch.bfloat16)
        and width % LANES == 0
        and _known(weights.activation)
        and available()
    )


@cache
def _known(activation: Activation) -> bool:
    try:
        recognise(activation)
    except UnsupportedActivation:
        return False
    return True
