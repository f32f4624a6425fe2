"""Key/value cache with one slot per running sequence, and its accounting in blocks.

A slot holds one sequence's whole context, so a decode step over neighbouring slots reads a view. A block table would
share memory between long and short sequences, but on a CPU it turns every step into a copy of the live cache; untouched
pages of a slot cost no memory anyway. Widths are taken from the first write, so latent caches whose keys and values
differ (DeepSeek's MLA) need nothing special.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

BLOCK_TOKENS = 16
"""Unit of admission and of the reported load, as in other runtimes, so that their figures compare."""


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class BlockBudget:
    """Slots and blocks handed out and taken back. A sequence reserves its longest possible context when admitted, so a
    running sequence can never run out of memory and nothing is ever preempted."""

    def __init__(self, slots: int, kv_tokens: int) -> None:
        self.blocks = kv_tokens // BLOCK_TOKENS
        self.used = 0
        self._free_slots = list(range(slots))
        self._reserved: dict[int, int] = {}

    def can_admit(self, tokens: int) -> bool:
        return bool(self._free_slots) and self.used + blocks_for(tokens) <= self.blocks

    def admit(self, tokens: int) -> int:
        """Reserve a slot for a context of `tokens`. The lowest free one: neighbouring slots are read without a copy."""
        assert self.can_admit(tokens)
        slot = min(self._free_slots)
        self._free_slots.remove(slot)
        self._reserved[slot] = blocks_for(tokens)
        self.used += self._reserved[slot]
        return slot

    def release(self, slot: int) -> None:
        self.used -= self._reserved.pop(slot)
        self._free_slots.append(slot)


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Where one forward of B rows and Q columns reads and writes.

    slots      [B]     slot of each row, ascending
    positions  [B, Q]  int64 position of each token in its sequence
    valid      [B * Q] int64 flat indices of the tokens that are not padding, or None if all are
    length             keys to read: the highest position plus one
    """

    slots: Sequence[int]
    positions: Tensor
    valid: Tensor | None
    length: int


class SlotCache(Cache):
    """The cache a transformers model writes through; `attach` says where before each forward."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._shape = (slots, max_tokens)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._length = 0

    def attach(self, rows: CacheRows) -> None:
        first, count, columns = rows.slots[0], len(rows.slots), rows.positions.shape[1]
        adjacent = rows.slots[-1] - first == count - 1
        slots = torch.tensor(rows.slots, device=rows.positions.device)
        self._read: slice | Tensor = slice(first, first + count) if adjacent else slots
        self._length = rows.length
        self._valid = rows.valid
        self._write_slots = slots.repeat_interleave(columns)
        self._write_positions = rows.positions.reshape(-1)
        if rows.valid is not None:
            self._write_slots = self._write_slots[rows.valid]
            self._write_positions = self._write_positions[rows.valid]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, Q, width] of one layer; return those of the rows' whole contexts."""
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._allocate(key_states)
            self._values[layer_idx] = self._allocate(value_states)
        return self._exchange(self._keys[layer_idx], key_states), self._exchange(self._values[layer_idx], value_states)

    def _allocate(self, states: Tensor) -> Tensor:
        slots, max_tokens = self._shape
        return states.new_zeros(slots, states.shape[1], max_tokens, states.shape[3])

    def _exchange(self, store: Tensor, states: Tensor) -> Tensor:
        tokens = states.transpose(1, 2).flatten(0, 1)
        store[self._write_slots, :, self._write_positions] = tokens if self._valid is None else tokens[self._valid]
        return store[self._read, :, : self._length]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Erase a slot whose forward failed: masked keys get weight 0, and 0 times a stale NaN is NaN."""
        for store in (*self._keys.values(), *self._values.values()):
            store[slot].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self._length, 0
