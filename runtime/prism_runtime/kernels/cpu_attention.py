"""Attention over keys and values in blocks, in compiled C, for one new token a row on a CPU."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prism_runtime import native

SOURCE = Path(__file__).with_name("cpu_attention.c")
FLAGS = ("-fopenmp", "-Wno-psabi")
DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    """`shape` of cpu_attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "groups", "key_width", "value_width")),
        *((name, ctypes.c_int64) for name in ("per_row", "length", "bfloat16", "threads")),
        ("scale", ctypes.c_double),
    )


def available() -> bool:
    """Whether the C could be compiled here."""
    return _library() is not None


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Softmax-weighted sums of values [B, heads, value_width] in the query's dtype; one query position a row.

    query   [B, heads, key_width]
    keys    [blocks, 16, groups, key_width]   float32 or bfloat16, contiguous; heads is a multiple of groups
    values  [blocks, 16, groups, value_width] likewise
    tables  [B, n]      int64 blocks of each row, in order
    mask    [B, 16 n]   added to the scores; everything at or below -1e30 is not read
    sinks   [heads]     one more score a head that weighs nothing, or None

    A row gives the same bits in any company. Uses as many threads as torch. Raises MemoryError.
    """
    library = _library()
    assert library is not None, "callers ask `available` first"
    (rows, heads, key_width), (_, _, groups, value_width) = query.shape, values.shape
    shape = _Shape(
        *(rows, heads, groups, key_width, value_width, tables.shape[1], mask.shape[1]),
        *(keys.dtype == torch.bfloat16, torch.get_num_threads(), scale),
    )
    out = torch.empty(rows, heads, value_width)
    read = (query.float(), keys, values, tables, mask.float(), None if sinks is None else sinks.float())
    held = [None if tensor is None else tensor.contiguous() for tensor in read]  # alive until the call returns
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in held]
    if library.prism_attention(ctypes.byref(shape), *pointers, ctypes.c_void_p(out.data_ptr())):
        raise MemoryError(f"no memory for the scores of {rows} rows")
    return out.to(query.dtype)


@cache
def _library() -> ctypes.CDLL | None:
    return native.library(SOURCE, FLAGS)
