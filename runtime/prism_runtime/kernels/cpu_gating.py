"""`gating.cells_to_run` for the few rows of a decode step on a CPU: two calls into compiled C a layer."""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from prism_runtime import native
from prism_runtime.kernels import gating
from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import BATCH, PlanTensor

SOURCE = Path(__file__).with_name("cpu_gate.c")
FLAGS = ("-Wno-psabi",)
EVERY_OUTPUT = -1.0
"""A kappa of cpu_gate.c: decides no cell by the mean."""
LAYERS_TIMES_POINTS = 4096
"""Whose pointers are kept: gathering them takes as long as using them."""


SIZES = ("rows", "top_k", "experts", "sub_experts", "neurons", "hidden", "rank", "cap", "point", "at")


class _Shape(ctypes.Structure):
    """`shape` of cpu_gate.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        ("kappa", ctypes.c_float),
    )


class _Fitted(ctypes.Structure):
    """`fitted` of cpu_gate.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "deviation", "token", "a", "u", "c")
    )


PLAN = ("tau", "shift", "ran", "routed", "extra", "spent")


class _LivePlan(ctypes.Structure):
    """`live_plan` of cpu_gate.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in PLAN)


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
    """See `gating.cells_to_run`; H is a multiple of 16. Batch points, whose rows compete, are left to it."""
    points = plan.gated_rows
    if any(plan.mode_of(point) == BATCH for point in points):
        return gating.cells_to_run(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
    library = _library()
    assert library is not None, "callers ask `available` first"
    (tokens, top_k), (experts, sub_experts, doubled, width) = expert_ids.shape, weights.w1.shape
    shape = _Shape(tokens, top_k, experts, sub_experts, doubled // 2, width)
    ids, router = expert_ids.long().contiguous(), router_weights.float().contiguous()
    keep = torch.empty(tokens, top_k, sub_experts, dtype=torch.bool)
    live = _LivePlan(*(getattr(plan, name).data_ptr() for name in PLAN))
    at_shape, at_plan = ctypes.addressof(shape), ctypes.addressof(live)
    if sum(map(len, points.values())) < tokens:
        counts = plan.row_counts(layer).contiguous()
        library.prism_prefix_cells(
            *(at_shape, counts.data_ptr(), counts.shape[1]),
            *(ids.data_ptr(), router.data_ptr(), keep.data_ptr(), at_plan),
        )
    if not points:
        return keep, None
    gated, residual_rms = gating.require_gate(gated, residual_rms)
    x, rms = hidden.float().contiguous(), residual_rms.contiguous()
    compensated = any(point in gated.compensation for point in points)
    added = torch.zeros(tokens, width) if compensated or weights.b2 is not None else None
    score = torch.empty(top_k * sub_experts)
    for point, rows in points.items():
        fitted, shape.kappa, shape.rank = _fitted(gated.gate, gated.compensation.get(point))
        shape.cap, shape.point, shape.at = plan.cap_of(point), point, point * plan.tau.shape[1] + layer
        library.prism_threshold_cells(
            *(at_shape, ctypes.addressof(fitted.pointers), rows.data_ptr(), len(rows), x.data_ptr(), ids.data_ptr()),
            *(router.data_ptr(), rms.data_ptr(), keep.data_ptr(), None if added is None else added.data_ptr()),
            *(score.data_ptr(), at_plan),
        )
        if weights.b2 is not None and added is not None:
            valid = ids[rows] < experts
            added[rows] += gating.silent_biases(ids[rows], router[rows], valid, keep[rows], weights.b2)
    return keep, added


def available() -> bool:
    """Whether the C could be compiled here."""
    return _library() is not None


@dataclass(frozen=True, slots=True)
class _Held:
    """Pointers, and the tensors that they point into."""

    pointers: _Fitted
    tensors: tuple[Tensor | None, ...]


@lru_cache(maxsize=LAYERS_TIMES_POINTS)
def _fitted(gate: GateWeights, compensation: CompensationWeights | None) -> tuple[_Held, float, int]:
    """(what C reads of them, kappa, rank of the compensation); both are known by identity."""
    of_gate = gate.weight, gate.bias, gate.mean, gate.deviation, gate.token
    of_point = (None,) * 3 if compensation is None else (compensation.a, compensation.u, compensation.c)
    tensors = tuple(None if tensor is None else tensor.contiguous() for tensor in (*of_gate, *of_point))
    pointers = _Fitted(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    kappa = EVERY_OUTPUT if gate.kappa is None else gate.kappa
    return _Held(pointers, tensors), kappa, 0 if compensation is None else len(compensation.u)


@cache
def _library() -> ctypes.CDLL | None:
    library = native.library(SOURCE, FLAGS)
    if library is not None:
        address, number = ctypes.c_void_p, ctypes.c_int64
        library.prism_prefix_cells.argtypes = [address, address, number, *[address] * 4]
        library.prism_threshold_cells.argtypes = [address, address, address, number, *[address] * 8]
    return library
