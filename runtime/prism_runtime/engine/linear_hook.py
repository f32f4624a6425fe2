"""The adapter to torch's oneDNN operators: lets a model's float32 projections use weights that are packed once.

On a CPU torch multiplies float32 by MKL, which packs the weights in every call and on processors of other makers than
its own does not use their widest vectors; oneDNN with packed weights is faster from a few rows on. bfloat16 goes
through oneDNN in torch already.

The operators are those that torch.compile emits for frozen weights, and are not public; where this torch lacks them,
layers stay as they are.
"""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LEAST_PRODUCTS = 2**20
"""Below so many multiply-adds, starting oneDNN takes longer than it saves."""
TYPICAL_ROWS = 32
"""The packed layout is the best for so many rows; others cost little more."""


class PackedLinear(nn.Module):
    """What `linear` computes, up to the order of its sums. Keeps its own weights only where few rows need them."""

    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._size = linear.weight.numel()
        self.bias = linear.bias
        self.weight = linear.weight if self._size < LEAST_PRODUCTS else None
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_ROWS)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        if self.weight is not None and rows.numel() // rows.shape[-1] * self._size < LEAST_PRODUCTS:
            return nn.functional.linear(rows, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return out


def pack_linears(model: PreTrainedModel) -> None:
    """Pack the weights of every float32 `nn.Linear` of a model on a CPU; without effect on others."""
    if model.device.type != "cpu" or not available():
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            model.set_submodule(name, PackedLinear(module))


@cache
def available() -> bool:
    """Whether this torch has the operators."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
