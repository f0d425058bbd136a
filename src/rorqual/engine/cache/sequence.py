"""A running sequence's part of the cache: what the native step is given for it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.cache.plan import ReusePlan
from rorqual.engine.cache.pool import Bytes
from rorqual.engine.cache.prefix_tree import KEY_NBYTES, Node


class SequenceCache:
    """State, block table and tokens of one sequence. ``PrefixCache`` changes it, others read.

    Between ``begin`` and ``finish`` (or ``preempt``) it is open and holds memory.
    """

    def __init__(self, plan: ReusePlan, state: Bytes, data: bytes, nodes: list[Node]) -> None:
        """data: key bytes of the tokens before ``plan.restart``."""
        self.plan = plan
        self.state = state
        """The state buffer, uint8: to be read and written by the step."""
        self.nodes = nodes
        """The tree's nodes of the whole blocks so far, ``matched`` ones ahead of ``length``."""
        self.num_saved = 0
        """How many of ``nodes`` are on disk or on their way."""
        self.pending_checkpoint: Bytes | None = None
        """Taken at the last block boundary of an answer, kept if the answer ends before the
        next."""
        self.is_open = True
        self._tokens = array("i")
        self._tokens.frombytes(data)
        self._blocks = np.empty(max(16, 2 * len(nodes)), np.int32)
        self._num_blocks = 0
        self.extend([node.block for node in nodes])

    @property
    def length(self) -> int:
        """Tokens consumed: the position of the next one."""
        return len(self._tokens)

    @property
    def is_replaying(self) -> bool:
        """The next tokens must be fed with REPLAY: their entries are in shared blocks already."""
        return self.length < self.plan.matched_tokens

    @property
    def block_table(self) -> NDArray[np.int32]:
        """Numbers of its blocks, in order; a view, valid until the next ``reserve``."""
        return self._blocks[: self._num_blocks]

    @property
    def num_blocks(self) -> int:
        """Length of ``block_table``."""
        return self._num_blocks

    def key(self, index: int) -> bytes:
        """The tree's key of whole block ``index``."""
        begin = index * KEY_NBYTES
        return bytes(memoryview(self._tokens).cast("B")[begin : begin + KEY_NBYTES])

    # ---- for PrefixCache ----------------------------------------------------------------------
    def push(self, tokens: Sequence[int]) -> None:
        """Count ``tokens`` as consumed."""
        self._tokens.extend(tokens)

    def extend(self, blocks: Sequence[int]) -> None:
        """Append to the block table."""
        need = self._num_blocks + len(blocks)
        if need > len(self._blocks):
            grown = np.empty(max(need, 2 * len(self._blocks)), np.int32)
            grown[: self._num_blocks] = self.block_table
            self._blocks = grown
        self._blocks[self._num_blocks : need] = blocks
        self._num_blocks = need

    def replace(self, index: int, block: int) -> None:
        """Use another block with the same contents."""
        self._blocks[index] = block
