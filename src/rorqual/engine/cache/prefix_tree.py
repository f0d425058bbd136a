"""Which token blocks are in memory, as a tree: the path from the root spells the tokens.

One node per whole block of ``BLOCK_TOKENS`` tokens; children are found by the block's token bytes,
so a match is exact and costs one dictionary look-up per block. The tree decides what is worth
least when memory is short. It knows block numbers, not memory; ``cache`` frees what it sheds.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rorqual.engine.cache.pool import Bytes
from rorqual.kernels.layout import BLOCK_TOKENS

TOKEN_NBYTES = 4
KEY_NBYTES = BLOCK_TOKENS * TOKEN_NBYTES
"""A block's key: its tokens as little-endian int32."""
DIGEST_NBYTES = 16


def chain(parent: bytes, key: bytes) -> bytes:
    """The digest of a prefix, from that of the prefix one block shorter."""
    return hashlib.blake2b(parent + key, digest_size=DIGEST_NBYTES).digest()


class Node:
    """One block. ``block`` is -1 for the root only."""

    __slots__ = (
        "block", "checkpoint", "children", "digest", "key", "last_use", "parent", "share", "uses",
    )  # fmt: skip

    def __init__(self, parent: Node | None, key: bytes, block: int, digest: bytes) -> None:
        self.parent = parent
        self.key = key
        self.block = block
        self.digest = digest
        self.children: dict[bytes, Node] | None = None
        self.checkpoint: Bytes | None = None
        """The state after this block, if kept."""
        self.share = 0.0
        """What it counts for, up to 1; see ``plan.checkpoint_share``."""
        self.uses = 0.0
        """Decayed count up to ``last_use``; being computed counts as the first use."""
        self.last_use = 0.0


class Shed(NamedTuple):
    """What the tree gave up: a checkpoint, and with it the node's block unless -1."""

    checkpoint: Bytes | None
    block: int


class PrefixTree:
    """The tree. Not thread-safe.

    Args:
        root: digest of the empty prefix: who the model is.
        half_life_s: time after which a use counts half.
    """

    def __init__(self, root: bytes, half_life_s: float) -> None:
        self.root = Node(None, b"", -1, root)
        self.num_nodes = 0
        self._half_life_s = half_life_s
        self._leaves: dict[Node, None] = {}
        self._with_checkpoint: dict[Node, None] = {}

    def match(self, data: bytes, max_blocks: int) -> list[Node]:
        """The nodes of the longest known prefix of the tokens ``data``, outermost first."""
        found: list[Node] = []
        node = self.root
        for begin in range(0, max_blocks * KEY_NBYTES, KEY_NBYTES):
            if node.children is None:
                break
            child = node.children.get(data[begin : begin + KEY_NBYTES])
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def child(self, parent: Node, key: bytes) -> Node | None:
        """The node after ``parent`` for the block ``key``."""
        return None if parent.children is None else parent.children.get(key)

    def add(self, parent: Node, key: bytes, block: int, now: float) -> Node:
        """A new node, used once."""
        node = Node(parent, key, block, chain(parent.digest, key))
        node.uses, node.last_use = 1.0, now
        if parent.children is None:
            parent.children = {}
            self._leaves.pop(parent, None)
        parent.children[key] = node
        self._leaves[node] = None
        self.num_nodes += 1
        return node

    def keep_checkpoint(self, node: Node, checkpoint: Bytes, share: float) -> None:
        """Attach a checkpoint to a node that has none."""
        assert node.checkpoint is None
        node.checkpoint, node.share = checkpoint, share
        self._with_checkpoint[node] = None

    def use(self, nodes: Sequence[Node], now: float) -> None:
        """Count one use of each."""
        for node in nodes:
            node.uses = self._uses(node, now) + 1.0
            node.last_use = now

    def shed(
        self, now: float, is_held: Callable[[Node], bool], block_nbytes: int
    ) -> Iterator[Shed]:
        """Remove what is worth least, one thing per item, until nothing removable is left.

        Worth is (decayed uses) x tokens / bytes, the least recently used first among equals.
        Blocks go from the leaves inwards and never while ``is_held``. A checkpoint saves the
        recomputation of one window of tokens but takes several blocks' bytes: it goes first unless
        it is used much more. A dense one saves less, for its neighbours are near.
        """
        order = itertools.count()
        heap: list[tuple[float, float, int, bool, Node]] = []

        def push(node: Node, nbytes: int, *, is_block: bool) -> None:
            share = 1.0 if is_block else node.share
            worth = self._uses(node, now) * share * BLOCK_TOKENS / nbytes
            heapq.heappush(heap, (worth, node.last_use, next(order), is_block, node))

        for node in self._with_checkpoint:
            assert node.checkpoint is not None
            push(node, node.checkpoint.nbytes, is_block=False)
        for node in self._leaves:
            if not is_held(node):
                push(node, block_nbytes, is_block=True)
        while heap:
            *_, is_block, node = heapq.heappop(heap)
            if not is_block:
                if node.checkpoint is not None:  # else it went with its block
                    yield Shed(self._drop_checkpoint(node), -1)
                continue
            parent = self._remove(node)
            checkpoint = None if node.checkpoint is None else self._drop_checkpoint(node)
            if parent is not None and not is_held(parent):
                push(parent, block_nbytes, is_block=True)
            yield Shed(checkpoint, node.block)

    def _uses(self, node: Node, now: float) -> float:
        return float(node.uses * 0.5 ** ((now - node.last_use) / self._half_life_s))

    def _drop_checkpoint(self, node: Node) -> Bytes | None:
        checkpoint, node.checkpoint = node.checkpoint, None
        del self._with_checkpoint[node]
        return checkpoint

    def _remove(self, node: Node) -> Node | None:
        """Cut off a leaf; its parent if that became one."""
        parent = node.parent
        assert parent is not None
        assert parent.children is not None
        assert node.children is None
        del parent.children[node.key], self._leaves[node]
        self.num_nodes -= 1
        if parent.children:
            return None
        parent.children = None
        if parent is self.root:
            return None
        self._leaves[parent] = None
        return parent
