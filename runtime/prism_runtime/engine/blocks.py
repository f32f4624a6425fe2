"""Memory for keys and values, in blocks: what each sequence holds, what is shared, what is kept for later.

A sequence takes blocks as it grows. A block is free, used (by one sequence or several), or kept: used by none, but of
known content (`prefix_cache`) and given up when free ones run out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prism_runtime.engine.prefix_cache import BLOCK_TOKENS, Node, PrefixCache


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@dataclass(slots=True, eq=False)
class Context:
    """The memory of one running sequence.

    cached  tokens whose keys and values are in `blocks`, from the sequence's first on
    nodes   what the prefix cache calls the complete blocks
    points  of each block that was begun here, the smallest operating point that computed a part of it
    """

    blocks: list[int]
    cached: int
    nodes: list[Node] = field(repr=False)
    points: list[int] = field(repr=False)


class BlockPool:
    """Blocks 0 to `blocks` - 1, handed out, shared and taken back."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.prefixes = PrefixCache()
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free or kept."""
        return len(self._free) + self.prefixes.kept

    @property
    def used(self) -> int:
        return self.blocks - self.available

    # -- a sequence's life --------------------------------------------------------------------------------------

    def can_open(self, tokens: int, known: Sequence[Node], spare: int) -> bool:
        """Whether a context of `tokens` that begins with `known` fits and leaves `spare` blocks for others to grow."""
        claimed = sum(self.prefixes.holds_unreferenced(node.block) for node in known)
        return self.available - claimed - (blocks_for(tokens) - len(known)) >= spare

    def open(self, tokens: int, known: Sequence[Node]) -> Context:
        """Memory for `tokens`, of which the blocks of `known` are there already."""
        for node in known:
            self._share(node.block)
        fresh = [self._take() for _ in range(blocks_for(tokens) - len(known))]
        shared = [node.block for node in known]
        return Context([*shared, *fresh], len(known) * BLOCK_TOKENS, list(known), [node.point for node in known])

    def can_grow(self, context: Context) -> bool:
        """Whether the context has room for one more token, or can get it."""
        return context.cached < len(context.blocks) * BLOCK_TOKENS or self.available > 0

    def grow(self, context: Context) -> None:
        """Make room for one more token."""
        if context.cached == len(context.blocks) * BLOCK_TOKENS:
            context.blocks.append(self._take())

    def advance(self, context: Context, tokens: Sequence[int], length: int, point: int) -> None:
        """`length` more of the sequence's `tokens` were computed at `point`; complete blocks can be shared from now."""
        first, end = context.cached // BLOCK_TOKENS, blocks_for(context.cached + length)
        for index in range(first, end):
            if index == len(context.points):
                context.points.append(point)
            context.points[index] = min(point, context.points[index])
        context.cached += length
        while (index := len(context.nodes)) < context.cached // BLOCK_TOKENS:
            content = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            parent = context.nodes[-1] if context.nodes else None
            node = self.prefixes.remember(parent, content, context.points[index], context.blocks[index])
            context.nodes.append(node)

    def close(self, context: Context) -> None:
        """Take back a context's blocks; the shared ones stay with the others, those of known content are kept."""
        self._drop(reversed(context.blocks))
        context.blocks.clear()

    def unfinished(self, context: Context) -> list[int]:
        """Blocks that nobody else can read yet: those after the last complete one."""
        return context.blocks[len(context.nodes) :]

    # -- references ---------------------------------------------------------------------------------------------

    def _take(self) -> int:
        block = self._free.pop() if self._free else self.prefixes.evict()
        self._references[block] = 1
        return block

    def _share(self, block: int) -> None:
        if not self._references[block]:
            self.prefixes.claim(block)
        self._references[block] += 1

    def _drop(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block] and not self.prefixes.keep(block):
                self._free.append(block)
