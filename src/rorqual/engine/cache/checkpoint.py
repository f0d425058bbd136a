"""What a state must contain for a sequence to go on from a block boundary, as flat bytes.

A state's rings have room to spare and hold what is of no use later; a checkpoint holds the rest: of
every layer the last ``window`` entries in order of position, of overlapping compressors the rows of
the last group (the next one pools them again), and the residual streams that wait for the MTP
block. Plain compressors need nothing: at a block boundary none of their groups is unfinished.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rorqual.engine.cache.pool import Bytes, mapped
from rorqual.kernels.layout import BLOCK_TOKENS, CacheLayout


class _Ring(NamedTuple):
    offset: int
    slots: int
    row_nbytes: int
    kept: int
    """Rows that a checkpoint takes: those of the positions just before it."""


def checkpoint_nbytes(layout: CacheLayout) -> int:
    """Bytes of one checkpoint, the same at every position."""
    rings = sum(ring.kept * ring.row_nbytes for ring in _rings(layout))
    return rings + layout.state_nbytes - layout.pending_streams


def export_checkpoint(layout: CacheLayout, state: Bytes, position: int) -> Bytes:
    """Copy out of ``state``, which has consumed exactly ``position`` tokens.

    position: a multiple of ``BLOCK_TOKENS``, at least one block.

    Memory of its own from the system: out of the allocator's heap, what is dropped between others
    that stay would be lost to everybody. Raises OSError if the system has none.
    """
    _check(position)
    _, data = mapped(checkpoint_nbytes(layout))
    done = 0
    for ring in _rings(layout):
        size = ring.kept * ring.row_nbytes
        rows = data[done : done + size].reshape(ring.kept, ring.row_nbytes)
        np.take(_view(state, ring), _slots(ring, position), axis=0, out=rows)
        done += size
    data[done:] = state[layout.pending_streams : layout.state_nbytes]
    return data


def import_checkpoint(
    layout: CacheLayout, data: bytes | Bytes, position: int, state: Bytes
) -> None:
    """Put a checkpoint taken at ``position`` into a zeroed ``state``; it may go on from there."""
    _check(position)
    source = np.frombuffer(data, np.uint8)
    assert len(source) == checkpoint_nbytes(layout), "not a checkpoint of this layout"
    done = 0
    for ring in _rings(layout):
        size = ring.kept * ring.row_nbytes
        rows = source[done : done + size].reshape(ring.kept, ring.row_nbytes)
        _view(state, ring)[_slots(ring, position)] = rows
        done += size
    state[layout.pending_streams : layout.state_nbytes] = source[done:]


def _rings(layout: CacheLayout) -> Iterator[_Ring]:
    for layer in layout.layers:
        yield _Ring(layer.window, layout.window_slots, layout.entry_nbytes, layout.window)
        if layer.raw_index >= 0:  # overlapping: a row is float32 values and as many scores
            yield _Ring(layer.raw, layer.raw_slots, 8 * layer.raw_columns, layer.ratio)
            yield _Ring(layer.raw_index, layer.raw_slots, 8 * layer.raw_index_columns, layer.ratio)


def _view(state: Bytes, ring: _Ring) -> Bytes:
    end = ring.offset + ring.slots * ring.row_nbytes
    return state[ring.offset : end].reshape(ring.slots, ring.row_nbytes)


def _slots(ring: _Ring, position: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # Positions before 0 fall on slots not written yet; a ring has more slots than are kept.
    return np.arange(position - ring.kept, position, dtype=np.int64) % ring.slots


def _check(position: int) -> None:
    assert position > 0, "an empty sequence needs no checkpoint"
    assert position % BLOCK_TOKENS == 0, f"{position} is not a block boundary"
