"""Memory for weights that stream: in pages of 2 MiB, a CPU follows them without pausing at every 4 KiB."""

import math
import mmap

import torch
from torch import Tensor

WORTH_BYTES = 4 << 20
"""Below this a tensor may hold no whole huge page."""


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of that shape, with the type and device of `like`.

    On a CPU its memory asks for huge pages; a system that gives none to programs that ask serves it as any other.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < WORTH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)  # which keeps the memory as long as itself
