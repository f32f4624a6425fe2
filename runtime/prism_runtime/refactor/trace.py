"""The offline engine's forwards: the stock model with its experts watched, and the packed model at a point."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_runtime.engine.experts_hook import bind_gates, bind_plan, experts_modules, pack
from prism_runtime.kernels.contract import GatedLayer
from prism_runtime.kernels.plan import PlanTables, PlanTensor
from prism_runtime.refactor.text import TokenSequence

Visit = Callable[[int, Tensor, Tensor, Tensor], None]
"""(MoE layer, hidden [T, H], expert ids [T, K], router weights [T, K]) of one batch."""


def batches(sequences: Sequence[TokenSequence], size: int = 8) -> Iterator[Sequence[TokenSequence]]:
    return (sequences[start : start + size] for start in range(0, len(sequences), size))


@torch.inference_mode()
def trace_experts(model: PreTrainedModel, batch: Sequence[TokenSequence], visit: Visit) -> None:
    """Run one batch through the stock model and show `visit` what enters every experts module."""

    def before(layer: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        visit(layer, *inputs, *named.values())

    hooks = [
        module.register_forward_pre_hook(partial(before, layer), with_kwargs=True)
        for layer, (_, module) in enumerate(experts_modules(model))
    ]
    try:
        model.base_model(torch.tensor([sequence.ids for sequence in batch]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


class PackedModel:
    """The packed model at one operating point at a time, without a cache; `model` is packed in place."""

    def __init__(self, model: PreTrainedModel, tables: PlanTables, gates: Sequence[GatedLayer] = ()) -> None:
        """`gates` are needed if the tables have threshold or batch points, one for each MoE layer."""
        pack(model, tables.sub_experts)
        if tables.gated:
            bind_gates(model, gates)
        self.plan = PlanTensor(tables, classes=1, device=model.device)
        bind_plan(model, self.plan)
        self._model = model

    @torch.inference_mode()
    def log_probabilities(self, batch: Sequence[TokenSequence], point: int) -> Tensor:
        """[B, S, vocabulary] float32 of the next token after every position, at a ladder index."""
        ids = torch.tensor([sequence.ids for sequence in batch])
        self.plan.write([point])
        self.plan.attach_rows([0] * ids.numel())
        return self._model(ids, use_cache=False).logits.float().log_softmax(-1)
