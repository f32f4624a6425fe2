"""What every sub-expert kernel computes, whatever it runs on, and where the engine gets one from."""

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True, slots=True, eq=False)
class GateWeights:
    """One layer's gate: predicts the logarithm of a sub-expert's output norm, without the router weight.

    weight     [E, N, H]  float32, of the row that enters the experts
    bias       [E, N]     float32
    mean       [E, N]     float32, of the prediction on calibration rows
    deviation  [E, N]     float32, of the same
    token      [H + 3]    float32, or None: weights of [x, R, log R, 1] for the token's sensitivity
    kappa                 a threshold farther than `kappa` deviations from `mean` is decided by `mean`, without the
                          product; None evaluates every output
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor
    token: Tensor | None
    kappa: float | None


@dataclass(frozen=True, slots=True, eq=False)
class CompensationWeights:
    """One layer's and point's stand-in for what is dropped: `([x, 1] a + sum of g c[e, n] over dropped cells) u`.

    a  [H + 1, r]  float32
    u  [r, H]      float32
    c  [E, N, r]   float32
    """

    a: Tensor
    u: Tensor
    c: Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GatedLayer:
    """What threshold and batch points need of one layer beside its experts; compensation by ladder index.

    Known by identity, so that a kernel can keep what it derives from one.
    """

    gate: GateWeights
    compensation: Mapping[int, CompensationWeights]


class SubExpertKernel(Protocol):
    """Weighted sum of the active sub-experts' outputs, one row a token.

    hidden          [T, H]
    expert_ids      [T, K]  int64, from the MoE router; ids >= E are another rank's experts and give nothing here
    router_weights  [T, K]  as the router scaled them; not renormalised over the sub-experts that run
    layer           index into the plan's tables, counted over MoE layers
    plan            rows attached for exactly these T rows
    gated           needed if a row stands at a threshold or batch point, else not read
    residual_rms    [T] float32, root mean square of the residual before the block's norm; needed with `gated`

    Returns [T, H] in the dtype of `hidden`, and adds to the plan's counters. A row is independent of the other rows'
    operating points, and at prefix and threshold points of the other rows.
    """

    def __call__(
        self,
        hidden: Tensor,
        expert_ids: Tensor,
        router_weights: Tensor,
        layer: int,
        plan: PlanTensor,
        weights: ExpertWeights,
        gated: GatedLayer | None = None,
        residual_rms: Tensor | None = None,
    ) -> Tensor: ...


REFERENCE, CPU, TRITON = "reference", "cpu", "triton"

_MODULES = {
    REFERENCE: "prism_runtime.kernels.reference",
    CPU: "prism_runtime.kernels.cpu_moe",
    TRITON: "prism_runtime.kernels.triton_moe",
}
"""Imported when asked for: a kernel may need a compiler or a device that this machine does not have."""


def kernel_of_device(device_type: str) -> str:
    """The kernel that serves on a kind of device: "cpu", "cuda" (NVIDIA and AMD). Others run the reference."""
    return {"cpu": CPU, "cuda": TRITON}.get(device_type, REFERENCE)


def load_kernel(name: str) -> SubExpertKernel:
    """The kernel of that name, ready to run: what it compiles is compiled here and not in a first request.

    Raises ValueError that lists the known ones.
    """
    if name not in _MODULES:
        raise ValueError(f"unknown kernel '{name}'; known: {', '.join(_MODULES)}")
    module = import_module(_MODULES[name])
    if name == CPU:
        module.available()
    elif name == TRITON:
        import_module("prism_runtime.kernels.triton_launcher").use_compiled()
    kernel: SubExpertKernel = module.sub_expert_moe
    return kernel
