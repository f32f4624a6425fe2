"""Reads the part of a GGUF file (version 3) that one model needs: metadata, and tensors of three storage types.

The format is specified in ggml's docs/gguf.md, the blocks in its src/ggml-common.h.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION, DEFAULT_ALIGNMENT = b"GGUF", 3, 32

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

F32 = np.dtype("<f4")
Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)])
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
STORAGE = {0: (F32, 1), 3: (Q4_1, 32), 8: (Q8_0, 32)}
"""Type number -> (one block, values in it)."""


class GgufRefused(ValueError):
    """The file is not GGUF, is cut short, or stores a tensor in a type that this reader does not know."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's place: `shape` outermost first, `start` in bytes from the file's begin."""

    shape: tuple[int, ...]
    block: np.dtype[Any]
    values_per_block: int
    start: int


class GgufFile:
    """`metadata` by key, and tensors by name. Raises GgufRefused."""

    def __init__(self, path: Path) -> None:
        self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        self._at = 0
        self._path = path
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise GgufRefused(
                f"'{path}' is cut short or damaged at byte {self._at}: {error}; fetch it again"
            ) from error

    def _read_header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        magic, version = self._take(4), self._scalar("<I")
        if (magic, version) != (MAGIC, VERSION):
            raise GgufRefused(
                f"'{self._path}' starts with {magic!r} and version {version}, not a GGUF file of version 3"
            )
        tensor_count, key_count = self._scalar("<Q"), self._scalar("<Q")
        metadata = {self._string(): self._value(self._scalar("<I")) for _ in range(key_count)}
        places = [self._place() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        data = -(-self._at // alignment) * alignment
        return metadata, {name: Stored(*rest, start=data + offset) for name, *rest, offset in places}

    def _place(self) -> tuple[str, tuple[int, ...], np.dtype[Any], int, int]:
        name = self._string()
        shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))[::-1]  # stored innermost first
        if (kind := self._scalar("<I")) not in STORAGE:
            raise GgufRefused(f"'{self._path}': tensor '{name}' has type {kind}; known are F32 (0), Q4_1 (3), Q8_0 (8)")
        return name, shape, *STORAGE[kind], self._scalar("<Q")

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor, dequantised."""
        stored = self.tensors[name]
        count = int(np.prod(stored.shape)) // stored.values_per_block
        end = stored.start + count * stored.block.itemsize
        if end > len(self._bytes):
            raise GgufRefused(f"'{self._path}' has {len(self._bytes)} bytes, '{name}' ends at {end}; fetch it again")
        return _dequantise(self._bytes[stored.start : end].view(stored.block)).reshape(stored.shape)

    def _take(self, count: int) -> bytes:
        content = self._bytes[self._at : self._at + count].tobytes()
        self._at += count
        return content

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            element, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(element) for _ in range(count)]
        if kind not in SCALARS:
            raise GgufRefused(f"'{self._path}' has a value of unknown type {kind} before byte {self._at}")
        return self._scalar(SCALARS[kind])


def _dequantise(blocks: NDArray[Any]) -> NDArray[np.float32]:
    if blocks.dtype == F32:
        return np.array(blocks, np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if blocks.dtype == Q8_0:
        return scale * blocks["values"].astype(np.float32)
    nibbles = np.concatenate((blocks["nibbles"] & 15, blocks["nibbles"] >> 4), 1)
    return scale * nibbles.astype(np.float32) + blocks["minimum"].astype(np.float32)[:, None]
