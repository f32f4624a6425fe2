"""What every sub-expert kernel computes, whatever it runs on, and where the engine gets one from."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

from prism_runtime.kernels.plan import PlanTensor

Activation = Callable[[Tensor, Tensor], Tensor]
"""(gate, up), any equal shape -> that shape; elementwise, so any subset of the neurons may be computed alone."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One layer's experts in sub-expert-major layout: E experts, N sub-experts of d neurons, hidden width H.

    w1  [E, N, 2d, H]  per sub-expert the rows of the gate projection, then those of the up projection
    w2  [E, N, d, H]   one row a neuron: the down projection, transposed
    b1  [E, N, 2d]     biases of w1's rows, or None
    b2  [E, H]         bias of the down projection, added once per (row, expert), or None

    The first n sub-experts of an expert are one contiguous slice of each, so a smaller budget is a view. Storing the
    gate rows of a whole expert before its up rows, as checkpoints do, would need two slices and two products.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    activation: Activation


class SubExpertKernel(Protocol):
    """Weighted sum of the active sub-experts' outputs, one row a token.

    hidden          [T, H]
    expert_ids      [T, K]  int64, from the MoE router; ids >= E are another rank's experts and give nothing here
    router_weights  [T, K]  as the router scaled them; not renormalised over the sub-experts that run
    layer           index into the plan's tables, counted over MoE layers
    plan            rows attached for exactly these T rows

    Returns [T, H] in the dtype of `hidden`, and adds to the plan's counters. A row is independent of the other rows'
    operating points.
    """

    def __call__(
        self,
        hidden: Tensor,
        expert_ids: Tensor,
        router_weights: Tensor,
        layer: int,
        plan: PlanTensor,
        weights: ExpertWeights,
    ) -> Tensor: ...


REFERENCE = "reference"

_MODULES = {REFERENCE: "prism_runtime.kernels.reference"}
"""Imported when asked for: a kernel may need a compiler or a device that this machine does not have."""


def load_kernel(name: str) -> SubExpertKernel:
    """The kernel of that name. Raises ValueError that lists the known ones."""
    if name not in _MODULES:
        raise ValueError(f"unknown kernel '{name}'; known: {', '.join(_MODULES)}")
    kernel: SubExpertKernel = import_module(_MODULES[name]).sub_expert_moe
    return kernel
