"""The model behind the engine: an unmodified Hugging Face forward over rows of different sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from prism_runtime.engine.attention_hook import bind_cache
from prism_runtime.engine.blocks import blocks_for
from prism_runtime.engine.cache import CacheRows, PagedCache
from prism_runtime.engine.experts_hook import UnsupportedModel, bind_gates, bind_plan, experts_modules, pack
from prism_runtime.engine.linear_hook import pack_linears
from prism_runtime.kernels.contract import GatedLayer, kernel_of_device
from prism_runtime.kernels.plan import PADDING, PlanTables, PlanTensor

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL_ATTENTION, SLIDING_ATTENTION}
"""The values of a configuration's `layer_types` whose mask this engine can build."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through the model: `tokens` stand at `start` of what `blocks` hold. The
    plan's `row` says at which operating point: that of a service class, or `ElasticModel.row_of_point`."""

    blocks: Sequence[int]
    start: int
    tokens: Sequence[int]
    row: int


def load_pretrained(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """(model with stock experts, tokenizer) of a local checkpoint. Nothing is downloaded, and no code in it runs."""
    logging.disable_progress_bar()  # it would write into a pod's log line by line
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


class ElasticModel:
    """A packed mixture-of-experts model, its cache and its plan tensor.

    `model` is packed in place and belongs to this object afterwards. `gates` are needed if the tables have threshold or
    batch points, one for each MoE layer. Raises UnsupportedModel if the model cannot be packed, ValueError if tables
    or gates do not fit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tables: PlanTables,
        *,
        classes: int,
        blocks: int,
        gates: Sequence[GatedLayer] = (),
    ) -> None:
        self.config = model.config.get_text_config()
        if unknown := set(getattr(self.config, "layer_types", None) or ()) - LAYER_TYPES:
            raise UnsupportedModel(
                f"attention layers of type {sorted(unknown)} cannot be served; known are {sorted(LAYER_TYPES)}"
            )
        pack(model, tables.sub_experts, kernel_of_device(model.device.type))
        layers = len(experts_modules(model))
        if tables.count.shape[1] != layers:
            raise ValueError(f"the plan has tables for {tables.count.shape[1]} MoE layers, the model has {layers}")
        if tables.gated:
            bind_gates(model, gates)
        pack_linears(model)
        self.model = model.eval()
        self._classes = classes
        self.plan = PlanTensor(tables, classes + len(tables.mode), model.device)
        self.set_points([len(tables.mode) - 1] * classes)
        bind_plan(model, self.plan)
        self.cache = PagedCache(blocks)
        bind_cache(model, self.cache)

    def check_points(self, class_point: Sequence[int]) -> None:
        """Raises ValueError unless there is one known ladder index for each service class."""
        if len(class_point) != self._classes or not all(0 <= point < self.plan.points for point in class_point):
            raise ValueError(
                f"class_point must hold {self._classes} ladder indices from 0 to {self.plan.points - 1}; "
                f"found {tuple(class_point)}"
            )

    def set_points(self, class_point: Sequence[int]) -> None:
        """Make the service classes' operating points live. Raises ValueError as `check_points` does."""
        self.check_points(class_point)
        self.plan.write((*class_point, *range(self.plan.points)))

    def row_of_point(self, point: int) -> int:
        """The plan's row for a sequence that runs at another point than its class."""
        return self._classes + point

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """float32 logits [len(chunks), vocabulary] after the last token of each chunk; writes their keys and values.

        Running a chunk again is harmless: it writes the same positions.
        """
        groups = _similar_lengths(chunks)
        if len(groups) == 1:
            return self._forward(chunks)
        rows = torch.cat([self._forward([chunks[i] for i in group]) for group in groups])
        order = torch.tensor([i for group in groups for i in group])
        return rows[order.argsort()]

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        lengths = [len(chunk.tokens) for chunk in chunks]
        columns, device = max(lengths), self.model.device
        pads = [columns - length for length in lengths]
        ids = [[*chunk.tokens, *[0] * pad] for chunk, pad in zip(chunks, pads, strict=True)]
        spans = [range(chunk.start, chunk.start + length) for chunk, length in zip(chunks, lengths, strict=True)]
        positions = torch.tensor([[*span, *[0] * pad] for span, pad in zip(spans, pads, strict=True)], device=device)
        row_class = [
            row
            for chunk, length, pad in zip(chunks, lengths, pads, strict=True)
            for row in (*[chunk.row] * length, *[PADDING] * pad)
        ]
        padding = torch.tensor([c == PADDING for c in row_class]).view_as(positions) if any(pads) else None
        length = self.cache.attach(CacheRows([_table(chunk) for chunk in chunks], positions, padding))
        self.plan.attach_rows(row_class)
        hidden = self.model.base_model(
            input_ids=torch.tensor(ids, device=device),
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(chunks)), torch.tensor(lengths) - 1]
        logits: Tensor = self.model.get_output_embeddings()(last)
        return logits.float()

    def _masks(self, positions: Tensor, length: int) -> Any:
        """Additive mask [B, 1, Q, length], or one per layer type for models whose layers differ."""
        key = torch.arange(length, device=positions.device)
        query = positions[:, :, None]
        window = getattr(self.config, "sliding_window", None)
        causal = key <= query
        sliding = causal & (key > query - window) if window else causal
        if layer_types := getattr(self.config, "layer_types", None):
            masks = {FULL_ATTENTION: causal, SLIDING_ATTENTION: sliding}
            return {layer_type: self._additive(masks[layer_type]) for layer_type in set(layer_types)}
        return self._additive(sliding)

    def _additive(self, allowed: Tensor) -> Tensor:
        dtype = self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _similar_lengths(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Indices of chunks that share a forward: the longest is at most twice the shortest, so at most half of a padded
    forward is padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens)):
        if not groups or len(chunks[i].tokens) > 2 * len(chunks[groups[-1][0]].tokens):
            groups.append([])
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def _table(chunk: Chunk) -> Sequence[int]:
    """The blocks up to the chunk's last token: a sequence may hold more already."""
    return chunk.blocks[: blocks_for(chunk.start + len(chunk.tokens))]
