"""The sub-expert layer on a CPU: compiled C for few rows, the torch reference for many, or where there is no compiler.

With few rows an expert, as in decode, time goes into streaming weights and into starting torch operations; the C does
the first in one pass and needs none of the second. With many rows, as in a long prefill, torch's products win.
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
FLAGS = ("-pthread", "-Wno-psabi")
MOST_ROWS_AN_EXPERT = {torch.float32: 128, torch.bfloat16: 20}
"""Above so many rows an expert, on average, torch's matrix products win: they hold more rows of a tile at once."""
MOST_ROWS_OF_NARROW_VECTORS = 12
"""The same without AVX-512, where sums of four rows fill the registers."""
WIDTH_MULTIPLE = 16


class _Shape(ctypes.Structure):
    """`shape` of cpu_experts.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("tokens", "top_k", "experts", "sub_experts", "neurons", "hidden"),
            *("ranks", "bfloat16", "activation", "threads"),
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
    if not _fits(hidden, expert_ids, weights):
        return reference.sub_expert_moe(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    if not plan.gated_rows:
        return _run_prefixes(hidden, expert_ids, router_weights, layer, plan, weights)
    keep, added = cpu_gating.cells_to_run(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    out = run_kept(hidden, expert_ids, router_weights, keep, weights)
    return out if added is None else out.add_(added)


def available() -> bool:
    """Whether the C could be compiled here."""
    return _library() is not None and cpu_gating.available()


def run_kept(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, keep: Tensor, weights: ExpertWeights
) -> Tensor:
    """[T, H]: the weighted sum of the sub-experts with `keep` [T, K, N] set, whatever chose them.

    Rows and weights are both float32 or both bfloat16, H a multiple of 16. A row gives the same bits in any company.
    Uses as many threads as torch. Raises MemoryError.
    """
    return _call(hidden, expert_ids, router_weights, weights, keep=keep)


def _run_prefixes(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, layer: int, plan: PlanTensor, weights: ExpertWeights
) -> Tensor:
    """Rows at prefix points alone: the C reads the plan's counts itself, and adds to its counters."""
    counts = plan.row_counts(layer)
    if len(hidden) != len(counts):
        raise ValueError(f"the plan has {len(counts)} rows attached, the forward has {len(hidden)}")
    return _call(hidden, expert_ids, router_weights, weights, counts=counts, ran=plan.ran, routed=plan.routed)


def _call(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    weights: ExpertWeights,
    *,
    keep: Tensor | None = None,
    counts: Tensor | None = None,
    ran: Tensor | None = None,
    routed: Tensor | None = None,
) -> Tensor:
    library = _library()
    assert library is not None, "callers ask `available` first"
    (tokens, top_k), (experts, sub_experts, doubled, width) = expert_ids.shape, weights.w1.shape
    shape = _Shape(
        *(tokens, top_k, experts, sub_experts, doubled // 2, width, 0 if counts is None else counts.shape[1]),
        *(weights.w1.dtype == torch.bfloat16, recognise(weights.activation), torch.get_num_threads()),
    )
    by_slot, out = torch.empty(tokens, top_k, width), torch.empty_like(hidden, memory_format=torch.contiguous_format)
    inputs = (
        *(hidden, expert_ids.long(), router_weights.float(), keep, counts),
        *(weights.w1, weights.w2, weights.b1, weights.b2),
    )
    # `held` keeps what is copied here alive until the call returns.
    held = [*(None if tensor is None else tensor.contiguous() for tensor in inputs), by_slot, out, ran, routed]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in held]
    if library.prism_experts(ctypes.addressof(shape), *pointers):
        raise MemoryError(f"no memory to route {tokens * top_k} slots to experts")
    return out


@cache
def _library() -> ctypes.CDLL | None:
    library = native.library(SOURCE, FLAGS)
    return None if library is None else typed(library)


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told that its function takes addresses."""
    library.prism_experts.argtypes = [ctypes.c_void_p] * 14
    return library


def _fits(hidden: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> bool:
    """Whether the C can run this layer and is the faster way."""
    experts, _, _, width = weights.w1.shape
    return (
        weights.w1.dtype in MOST_ROWS_AN_EXPERT
        and expert_ids.numel() <= _most_rows(weights.w1.dtype) * experts
        and hidden.dtype == weights.w1.dtype
        and width % WIDTH_MULTIPLE == 0
        and _known(weights.activation)
        and available()
    )


@cache
def _most_rows(dtype: torch.dtype) -> int:
    return MOST_ROWS_AN_EXPERT[dtype] if "avx512f" in native.processor_flags() else MOST_ROWS_OF_NARROW_VECTORS


@cache
def _known(activation: Activation) -> bool:
    try:
        recognise(activation)
    except UnsupportedActivation:
        return False
    return True
