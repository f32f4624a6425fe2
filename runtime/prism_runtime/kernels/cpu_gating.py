"""`gating.cells_to_run` for the few rows of a decode step on a CPU: two calls into compiled C a layer."""

import ctypes
from dataclasses import dataclass
from functools import cache
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


class _Shape(ctypes.Structure):
    """`shape` of cpu_gate.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "top_k", "experts", "sub_experts", "hidden", "rank", "cap")),
        *((name, ctypes.c_float) for name in ("tau", "kappa")),
    )


class _Fitted(ctypes.Structure):
    """`fitted` of cpu_gate.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "deviation", "token", "a", "u", "c")
    )


class _Tally(ctypes.Structure):
    """`tally` of cpu_gate.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("ran", "outputs", "dropped", "slots"))


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
    (tokens, top_k), (experts, sub_experts, _, width) = expert_ids.shape, weights.w1.shape
    shape = _Shape(tokens, top_k, experts, sub_experts, width)
    ids, router = expert_ids.long().contiguous(), router_weights.float().contiguous()
    keep = torch.empty(tokens, top_k, sub_experts, dtype=torch.bool)
    if sum(map(len, points.values())) < tokens:
        counts, tally = plan.row_counts(layer).contiguous(), _Tally()
        ranks = ctypes.c_int64(counts.shape[1])
        library.prism_prefix_cells(
            ctypes.byref(shape), _at(counts), ranks, _at(ids), _at(router), _at(keep), ctypes.byref(tally)
        )
        plan.ran += tally.ran
        plan.routed += tally.slots * sub_experts
    if not points:
        return keep, None
    gated, residual_rms = gating.require_gate(gated, residual_rms)
    rows_of_layer = _Rows(hidden.float().contiguous(), ids, router, residual_rms.contiguous(), keep)
    compensated = any(point in gated.compensation for point in points)
    added = torch.zeros(tokens, width) if compensated or weights.b2 is not None else None
    for point, rows in points.items():
        shape.tau, shape.cap = float(plan.threshold(point, layer)), plan.cap_of(point)
        tally = _threshold_cells(library, shape, rows, rows_of_layer, gated.gate, gated.compensation.get(point), added)
        if weights.b2 is not None and added is not None:
            valid = ids[rows] < experts
            added[rows] += gating.silent_biases(ids[rows], router[rows], valid, keep[rows], weights.b2)
        multiply_adds = tally.outputs * width + len(rows) * width * (gated.gate.token is not None)
        multiply_adds += 2 * shape.rank * width * len(rows) + shape.rank * tally.dropped
        extra = multiply_adds / (3 * width * weights.w2.shape[2])
        plan.charge(point, tally.ran, extra, tally.slots * sub_experts)
    return keep, added


def available() -> bool:
    """Whether the C could be compiled here."""
    return _library() is not None


@dataclass(frozen=True, slots=True)
class _Rows:
    """One layer's rows, contiguous: hidden [T, H], ids and weights of the router [T, K], rms [T], keep [T, K, N]."""

    hidden: Tensor
    expert_ids: Tensor
    router_weights: Tensor
    rms: Tensor
    keep: Tensor


def _threshold_cells(
    library: ctypes.CDLL,
    shape: _Shape,
    rows: Tensor,
    layer: _Rows,
    gate: GateWeights,
    compensation: CompensationWeights | None,
    added: Tensor | None,
) -> _Tally:
    """Fill in `keep` and `added` of the rows of one threshold point; `shape` has its tau and cap."""
    shape.kappa = EVERY_OUTPUT if gate.kappa is None else gate.kappa
    shape.rank = 0 if compensation is None else len(compensation.u)
    of_gate = gate.weight, gate.bias, gate.mean, gate.deviation, gate.token
    of_point = (None,) * 3 if compensation is None else (compensation.a, compensation.u, compensation.c)
    held = [None if tensor is None else tensor.contiguous() for tensor in (*of_gate, *of_point)]  # until C returns
    fitted = _Fitted(*(None if tensor is None else tensor.data_ptr() for tensor in held))
    score, tally = torch.empty(shape.top_k * shape.sub_experts), _Tally()
    library.prism_threshold_cells(
        ctypes.byref(shape),
        ctypes.byref(fitted),
        _at(rows),
        ctypes.c_int64(len(rows)),
        *map(_at, (layer.hidden, layer.expert_ids, layer.router_weights, layer.rms, layer.keep, added, score)),
        ctypes.byref(tally),
    )
    return tally


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@cache
def _library() -> ctypes.CDLL | None:
    return native.library(SOURCE, FLAGS)
