"""A stand-in for the native network: fills states and blocks by hashing what attention would read.

Same memory, same call as the native step, no arithmetic. Every byte a token writes depends on its
layer's window, on earlier compressed entries and on the layer below, so a stale ring slot, a wrong
block or a window rebuilt from too few tokens changes what comes out. Two runs agree byte for byte
exactly if they were given the same memories. Slow: for some thousand tokens.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rorqual.kernels.layout import BLOCK_TOKENS, CacheLayout, LayerLayout

Bytes = NDArray[np.uint8]
REPLAY = 1
"""Segment flag: fill windows and raw rows, leave compressed entries and keys as they are."""
_READ_ENTRIES = 3
"""Entries a token reads per layer, chosen by its hash as an indexer would by score."""


class FakeNetwork:
    """Hashes instead of matrices.

    mtp: the last layer of the layout plays the MTP block, which the output then depends on.
    """

    def __init__(self, layout: CacheLayout, *, mtp: bool = True) -> None:
        self.layout = layout
        self._num_layers = len(layout.layers) - mtp
        self.num_tokens = 0
        """Fed so far, replayed ones included."""
        self._slabs: list[Bytes] = []

    def add_slab(self, slab: Bytes) -> None:
        """Register the next slab of blocks."""
        self._slabs.append(slab)

    def step(
        self,
        tokens: Sequence[int],
        segments: Sequence[tuple[int, int, int]],
        states: Sequence[Bytes],
        block_tables: Sequence[NDArray[np.int32]],
    ) -> list[bytes]:
        """Feed a ragged batch; 8 bytes after each segment that differ for every past.

        segments: (number of tokens, start position, flags).
        """
        outputs: list[bytes] = []
        at = 0
        for (count, start, flags), state, table in zip(segments, states, block_tables, strict=True):
            output = b""
            for i in range(count):
                memory = _Memory(state, table, start + i, bool(flags & REPLAY))
                output = self._feed(memory, tokens[at + i])
            at += count
            outputs.append(output)
        assert at == len(tokens), "segments do not cover the batch"
        self.num_tokens += at
        return outputs

    def _feed(self, memory: _Memory, token: int) -> bytes:
        state, position = memory.state, memory.position
        pending = state[self.layout.pending_streams : self.layout.state_nbytes]
        ahead = b""
        if position and self._num_layers < len(
            self.layout.layers
        ):  # the MTP block lags by one: it takes the next token, too
            before = memory._replace(position=position - 1)
            ahead = self._layer(self.layout.layers[-1], before, _hash(pending.tobytes(), token))
        x = _hash(b"token", token)
        for layer in self.layout.layers[: self._num_layers]:
            x = self._layer(layer, memory, x)
        pending[:] = _expand(x, len(pending))
        return _hash(x + ahead, position)

    def _layer(self, layer: LayerLayout, memory: _Memory, x: bytes) -> bytes:
        layout, position = self.layout, memory.position
        entry = layout.entry_nbytes
        _write(memory.state, layer.window, layout.window_slots, entry, position, x)
        seen = _sum(memory.state, layer.window, layout.window_slots, entry, position, layout.window)
        if not layer.ratio:
            return _hash(x, seen)
        rings = [(layer.raw, 8 * layer.raw_columns)]
        if layer.raw_index >= 0:
            rings.append((layer.raw_index, 8 * layer.raw_index_columns))
        for at, size in rings:
            _write(memory.state, at, layer.raw_slots, size, position, x)
        if (position + 1) % layer.ratio == 0 and not memory.is_replay:
            self._compress(layer, memory, rings)
        visible = (position + 1) // layer.ratio
        chosen = {visible - 1, *(byte % visible for byte in x[:_READ_ENTRIES])} if visible else ()
        for index in sorted(chosen):
            for part in self._compressed(layer, memory, index):
                seen = zlib.crc32(part.data, seen)
        return _hash(x, seen)

    def _compress(self, layer: LayerLayout, memory: _Memory, rings: list[tuple[int, int]]) -> None:
        overlapping = layer.raw_index >= 0
        parts = self._compressed(layer, memory, memory.position // layer.ratio)
        for part, (at, size) in zip(parts, rings, strict=True):
            rows = layer.ratio * (2 if overlapping else 1)
            seen = _sum(memory.state, at, layer.raw_slots, size, memory.position, rows)
            part[:] = _expand(_hash(b"entry", seen), len(part))

    def _compressed(self, layer: LayerLayout, memory: _Memory, index: int) -> list[Bytes]:
        """Entry ``index`` of the sequence and, where the layer has one, its key."""
        in_table, in_block = divmod(index, BLOCK_TOKENS // layer.ratio)
        number, place = divmod(int(memory.table[in_table]), self.layout.slab_blocks)
        row = place * layer.entries_per_block + in_block
        parts: list[Bytes] = []
        for at, size in (
            (layer.block_entries, self.layout.entry_nbytes),
            (layer.block_keys, self.layout.key_nbytes),
        ):
            if at >= 0:
                parts.append(self._slabs[number][at + row * size : at + (row + 1) * size])
        return parts


class _Memory(NamedTuple):
    state: Bytes
    table: NDArray[np.int32]
    position: int
    is_replay: bool


def _hash(data: bytes, number: int) -> bytes:
    return hashlib.blake2b(data + number.to_bytes(8, "little"), digest_size=8).digest()


def _expand(seed: bytes, size: int) -> Bytes:
    return np.frombuffer(hashlib.shake_128(seed).digest(size), np.uint8)


def _write(state: Bytes, at: int, slots: int, size: int, position: int, seed: bytes) -> None:
    begin = at + position % slots * size
    state[begin : begin + size] = _expand(seed, size)


def _sum(state: Bytes, at: int, slots: int, size: int, position: int, count: int) -> int:
    """Checksum of a ring's rows for the last ``count`` positions up to ``position``."""
    first = max(0, position + 1 - count)
    low, high = first % slots, position % slots + 1
    ring = state[at : at + slots * size]
    if low < high:
        return zlib.crc32(ring[low * size : high * size].data)
    return zlib.crc32(ring[: high * size].data, zlib.crc32(ring[low * size :].data))
