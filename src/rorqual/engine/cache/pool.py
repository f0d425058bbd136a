"""Memory of the cache: reference-counted blocks of compressed entries, and sequence states.

Blocks live in slabs that are mapped when first needed and given back to the system when their last
block is freed, so neither a generous budget nor a past peak costs memory. What a block contains,
and who may use it, is other modules' business. Not thread-safe: the engine's thread owns it.
"""

from __future__ import annotations

import heapq
import mmap
from array import array
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rorqual.errors import ConfigError
from rorqual.kernels.layout import CacheLayout

Bytes: TypeAlias = NDArray[np.uint8]


class BlockPool:
    """Blocks by number, as the native step wants them: block b is the ``b % slab_blocks``-th of
    slab ``b // slab_blocks``.

    Args:
        budget_bytes: bytes that all blocks together may take; rounded down to whole blocks.
        on_slab: called with every new slab, in order of their numbers, before a block of it is
            handed out: the place to register it with the network.

    Raises:
        ConfigError: the budget holds no block.
    """

    def __init__(
        self,
        layout: CacheLayout,
        budget_bytes: int,
        on_slab: Callable[[Bytes], None] | None = None,
    ) -> None:
        self.layout = layout
        self.block_nbytes = max(1, layout.block_nbytes)
        self.capacity = budget_bytes // self.block_nbytes
        if self.capacity < 1:
            raise ConfigError(
                f"a cache of {budget_bytes} bytes holds no block; one takes {self.block_nbytes}"
            )
        self.num_used = 0
        self.num_shared = 0
        """Blocks with more than one holder."""
        self._on_slab = on_slab
        self._pieces = _pieces(layout)
        self._maps: list[mmap.mmap] = []
        self._slabs: list[Bytes] = []
        self._slab_used: list[int] = []
        self._holders = array("i")
        # The lowest free number first: the highest slabs become empty and are given back.
        self._free: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that can be acquired."""
        return self.capacity - self.num_used

    def holders(self, block: int) -> int:
        """How many hold ``block``; 0 for a free one."""
        return self._holders[block]

    def acquire(self) -> int:
        """A block with one holder, contents undefined. There must be a free one.

        Raises OSError, and nothing changed, if the system has no memory for another slab.
        """
        assert self.num_free > 0, "no free block"
        if not self._free:
            self._add_slab()
        block = heapq.heappop(self._free)
        self._holders[block] = 1
        self._slab_used[block // self.layout.slab_blocks] += 1
        self.num_used += 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block somebody holds."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] += 1
        self.num_shared += self._holders[block] == 2

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        assert self._holders[block] > 0, f"block {block} is released twice"
        self._holders[block] -= 1
        self.num_shared -= self._holders[block] == 1
        if self._holders[block]:
            return
        heapq.heappush(self._free, block)
        self.num_used -= 1
        slab = block // self.layout.slab_blocks
        self._slab_used[slab] -= 1
        if self._slab_used[slab] == 0:
            self._maps[slab].madvise(mmap.MADV_DONTNEED)

    def read_block(self, block: int) -> bytes:
        """The block's ``block_nbytes``: layer by layer, entries and then keys."""
        slab, index = self._locate(block)
        return b"".join(
            slab[at + index * size : at + (index + 1) * size].data for at, size in self._pieces
        )

    def write_block(self, block: int, data: bytes | Bytes) -> None:
        """Put back what ``read_block`` gave."""
        slab, index = self._locate(block)
        source = np.frombuffer(data, np.uint8)
        assert len(source) == self.layout.block_nbytes, "not a block of this layout"
        done = 0
        for at, size in self._pieces:
            slab[at + index * size : at + (index + 1) * size] = source[done : done + size]
            done += size

    def _locate(self, block: int) -> tuple[Bytes, int]:
        assert self._holders[block] > 0, f"block {block} is free"
        slab, index = divmod(block, self.layout.slab_blocks)
        return self._slabs[slab], index

    def _add_slab(self) -> None:
        mapping, slab = mapped(self.layout.slab_nbytes)
        if self._on_slab is not None:
            self._on_slab(slab)
        first = len(self._holders)
        self._maps.append(mapping)
        self._slabs.append(slab)
        self._slab_used.append(0)
        self._holders.extend([0] * self.layout.slab_blocks)
        # Ascending numbers above all others, which are in use: still a heap.
        self._free.extend(range(first, first + self.layout.slab_blocks))


class StatePool:
    """State buffers, all of one size. Mapped when first needed, then kept for the next sequence."""

    def __init__(self, layout: CacheLayout, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"max_sequences must be >= 1, got {capacity}")
        self.capacity = capacity
        self._nbytes = layout.state_nbytes
        self._free: list[Bytes] = []
        self._held: dict[int, Bytes] = {}

    @property
    def num_used(self) -> int:
        """States handed out."""
        return len(self._held)

    @property
    def num_free(self) -> int:
        """States that can be acquired."""
        return self.capacity - len(self._held)

    def acquire(self) -> Bytes:
        """A zeroed buffer: the state of an empty sequence. There must be a free one."""
        assert self.num_free > 0, "no free state"
        if self._free:
            state = self._free.pop()
            state.fill(0)
        else:
            state = mapped(self._nbytes)[1]
        self._held[id(state)] = state
        return state

    def release(self, state: Bytes) -> None:
        """Give back a buffer that ``acquire`` gave."""
        assert id(state) in self._held, "this state is not handed out"
        self._free.append(self._held.pop(id(state)))


def _pieces(layout: CacheLayout) -> list[tuple[int, int]]:
    """(offset in the slab of block 0's part, bytes of one block's part), in ``read_block``'s
    order."""
    found: list[tuple[int, int]] = []
    for layer in layout.layers:
        if layer.block_entries >= 0:
            found.append((layer.block_entries, layer.entries_per_block * layout.entry_nbytes))
        if layer.block_keys >= 0:
            found.append((layer.block_keys, layer.entries_per_block * layout.key_nbytes))
    return found


def mapped(nbytes: int) -> tuple[mmap.mmap, Bytes]:
    """Zeroed memory that costs nothing until touched and goes back to the system with the array.

    Raises OSError if the system has none.
    """
    mapping = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mapping, np.frombuffer(mapping, np.uint8)
