"""Keys and values in blocks, written and read by a transformers model through block tables.

A block holds its tokens side by side, each with all heads, so a step copies whole blocks into one place and the model
reads them as if they had always been contiguous. Rows whose blocks follow each other are read without a copy. Widths
are taken from the first write, so latent caches whose keys and values differ (DeepSeek's MLA) need nothing special.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.kernels import cpu_attention


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Where one forward of B rows and Q columns reads and writes.

    tables     B lists of blocks, enough for the row's highest position; shorter ones are filled up
    positions  [B, Q] int64 position of each token in its sequence
    padding    [B, Q] bool, true where a column holds no token; None if all do
    """

    tables: Sequence[Sequence[int]]
    positions: Tensor
    padding: Tensor | None


class PagedCache(Cache):
    """The cache a transformers model writes through; `attach` says where before each forward.

    One block more than `blocks` takes what padding writes and fills up tables; nobody's mask lets it through.

    read_in_place  layers whose attention reads the blocks itself (`attend`) when every row has one new token
    """

    def __init__(self, blocks: int) -> None:
        super().__init__(layers=[])
        self._nowhere = blocks
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._scratch: dict[tuple[str, int], Tensor] = {}
        self.read_in_place: frozenset[int] = frozenset()
        self._tables = torch.empty(0, 0, dtype=torch.int64)
        self._read: slice | Tensor = slice(0, 0)
        self._rows = self._length = self._columns = 0

    def attach(self, rows: CacheRows) -> int:
        """Returns the keys that each row reads: those of whole blocks, for the longest table."""
        most, device = max(map(len, rows.tables)), rows.positions.device
        tables = [[*table, *[self._nowhere] * (most - len(table))] for table in rows.tables]
        blocks = self._tables = torch.tensor(tables, device=device)
        flat = list(chain.from_iterable(tables))
        self._rows, self._columns = rows.positions.shape
        adjacent = flat == list(range(flat[0], flat[0] + len(flat)))
        self._read = slice(flat[0], flat[0] + len(flat)) if adjacent else blocks.flatten()
        write = blocks.gather(1, rows.positions // BLOCK_TOKENS) * BLOCK_TOKENS + rows.positions % BLOCK_TOKENS
        if rows.padding is not None:
            write = write.masked_fill(rows.padding, self._nowhere * BLOCK_TOKENS)
        self._write = write.flatten()
        self._length = most * BLOCK_TOKENS
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, Q, width] of one layer; return those of the rows' whole contexts.

        They stay valid until the next layer's. Of a layer that reads in place they are the new ones alone.
        """
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._allocate(key_states)
            self._values[layer_idx] = self._allocate(value_states)
        for stores, states in ((self._keys, key_states), (self._values, value_states)):
            tokens = states.transpose(1, 2).flatten(0, 1)
            stores[layer_idx].flatten(0, 1).index_copy_(0, self._write, tokens)
        if self.reads_in_place(layer_idx):
            return key_states, value_states
        return self._contexts("keys", self._keys[layer_idx]), self._contexts("values", self._values[layer_idx])

    def reads_in_place(self, layer_idx: int) -> bool:
        """Whether `attend` is to be used in the forward that was attached last."""
        return self._columns == 1 and layer_idx in self.read_in_place

    def attend(self, layer_idx: int, query: Tensor, mask: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """Attention [B, 1, heads, value width] of one query a row [B, heads, 1, key width]; mask [B, 1, 1, length]."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        out = cpu_attention.attend(query[:, :, 0], keys, values, self._tables, mask[:, 0, 0], scale, sinks)
        return out[:, None]

    def _allocate(self, states: Tensor) -> Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self._nowhere + 1, BLOCK_TOKENS, heads, width)

    def _contexts(self, kind: str, store: Tensor) -> Tensor:
        read = store[self._read] if isinstance(self._read, slice) else self._gather(kind, store, self._read)
        return read.view(self._rows, -1, *store.shape[2:]).transpose(1, 2)

    def _gather(self, kind: str, store: Tensor, blocks: Tensor) -> Tensor:
        """Copies of blocks, in memory that the layers share: they would miss the processor's caches more often."""
        flat = store.flatten(1)
        size, width = len(blocks), flat.shape[1]
        scratch = self._scratch.get((kind, width))
        if scratch is None or len(scratch) < size:
            scratch = self._scratch[kind, width] = flat.new_empty(size + size // 4, width)
        return torch.index_select(flat, 0, blocks, out=scratch[:size])

    @torch.inference_mode()
    def clear(self, blocks: Iterable[int]) -> None:
        """Erase blocks after a forward that failed: masked keys get weight 0, and 0 times a stale NaN is NaN."""
        index = [*blocks, self._nowhere]
        for store in (*self._keys.values(), *self._values.values()):
            store[index] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self._length, 0
