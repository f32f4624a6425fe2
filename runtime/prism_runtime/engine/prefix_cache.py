"""Which blocks hold the keys and values of which beginnings of text, so that equal beginnings are computed once.

A node is one block of tokens after a chain of others, computed at one operating point. Chains compare token ids
themselves, never a digest of them, so no text can be taken for another. A request at a point may read what was computed
at that point or a larger budget: such keys and values are at least as good as its own.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 16
"""Unit of memory, of sharing and of the reported load; as in other runtimes, so that their figures compare."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A block of known content. `serial` is never used again, unlike `block`; the root of all chains has serial 0."""

    serial: int
    parent: "Node | None" = field(repr=False)
    block: int
    content: tuple[int, ...] = field(repr=False)
    point: int

    @property
    def key(self) -> tuple[int, tuple[int, ...], int]:
        return (self.parent.serial if self.parent else 0, self.content, self.point)


class PrefixCache:
    """Nodes by parent, content and point. Those whose block nobody references are kept until memory is needed."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, tuple[int, ...], int], Node] = {}
        self._by_block: dict[int, Node] = {}
        self._unreferenced: OrderedDict[int, None] = OrderedDict()
        self._serials = 0

    @property
    def kept(self) -> int:
        """Blocks that no sequence references; `evict` can give up all of them."""
        return len(self._unreferenced)

    def match(self, tokens: Sequence[int], points: Sequence[int]) -> list[Node]:
        """The longest chain that begins `tokens` and was computed at one or several of `points`.

        It never covers the last token: somebody has to run that one for its logits.
        """
        ends: list[Node | None] = [None]
        for index in range((len(tokens) - 1) // BLOCK_TOKENS):
            content = tuple(tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS])
            keys = [(end.serial if end else 0, content, point) for end in ends for point in points]
            longer: list[Node | None] = [self._nodes[key] for key in keys if key in self._nodes]
            if not longer:
                break
            ends = longer
        return _chain(ends[0])

    def remember(self, parent: Node | None, content: Sequence[int], point: int, block: int) -> Node:
        """The node of this content. If another block holds it already, that one's node, and `block` is not kept."""
        self._serials += 1
        node = Node(self._serials, parent, block, tuple(content), point)
        if known := self._nodes.get(node.key):
            return known
        self._nodes[node.key] = self._by_block[block] = node
        return node

    def keep(self, block: int) -> bool:
        """The last reference to `block` is gone. False if its content is not known here, so that it is free."""
        if block not in self._by_block:
            return False
        self._unreferenced[block] = None
        return True

    def claim(self, block: int) -> None:
        """`block` is referenced again."""
        del self._unreferenced[block]

    def holds_unreferenced(self, block: int) -> bool:
        return block in self._unreferenced

    def evict(self) -> int:
        """Forget the block that has been unreferenced longest, and return it.

        Sequences drop their blocks last first, so a chain loses its end before its beginning.
        """
        block, _ = self._unreferenced.popitem(last=False)
        del self._nodes[self._by_block.pop(block).key]
        return block


def _chain(end: Node | None) -> list[Node]:
    chain = []
    while end:
        chain.append(end)
        end = end.parent
    return chain[::-1]
