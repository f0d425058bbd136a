"""Where the native engine keeps what a sequence remembers: byte layouts, from shapes alone.

Two memories, as in the report (3.5.1):

* *Blocks* hold compressed entries. A block covers ``BLOCK_TOKENS`` tokens of one sequence: for a
  layer of ratio r, ``BLOCK_TOKENS // r`` entries, and where the layer has an indexer as many keys.
  Blocks live in *slabs* of ``slab_blocks``; inside a slab each layer's entries, then its keys, lie
  together (layer-major), so that scanning one layer's keys streams.
* A *state* is one fixed-size buffer per sequence: every layer's window and the raw projections its
  compressors still need. All of it is addressed by position modulo a ring that has ``MAX_REWIND``
  slots to spare, so that taking back up to that many tokens is setting a length.

Nothing here allocates; ``cpu`` reads and writes these bytes, the engine's cache owns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLOCK_TOKENS = 128
"""Tokens per block: lcm(4, 128), so that every group of either ratio ends with a block."""
MAX_REWIND = 8
"""Most tokens that can be taken back from a state."""
_PENDING_SLOTS = MAX_REWIND + 1
_ALIGNMENT = 64

EntryFormat = Literal["fp32", "bf16", "record"]
"""``record``: FP8, one power-of-two scale per 64 dims; rotated dims BF16 (584 B for 512 + 64)."""
KeyFormat = Literal["fp32", "int8", "fp4"]
"""``int8``: one float32 scale per key; ``fp4``: a power-of-two scale per 32 dims (68 B for 128)."""

_RECORD_SCALE_DIMS = 64
_FP4_SCALE_DIMS = 32


def entry_nbytes(head_dim: int, rope_dim: int, kind: EntryFormat) -> int:
    """Bytes of one key/value entry. A record is padded to a multiple of 8."""
    if kind == "fp32":
        return 4 * head_dim
    if kind == "bf16":
        return 2 * head_dim
    plain = head_dim - rope_dim
    scales = -(-plain // _RECORD_SCALE_DIMS)
    return _round_up(plain + 2 * rope_dim + scales, 8)


def key_nbytes(index_dim: int, kind: KeyFormat) -> int:
    """Bytes of one indexer key, scales included."""
    if kind == "fp32":
        return 4 * index_dim
    if kind == "int8":
        return index_dim + 4
    return index_dim // 2 + index_dim // _FP4_SCALE_DIMS


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """One attention layer's places. Offsets in bytes; -1 where the layer has no such part."""

    ratio: int
    entries_per_block: int
    block_entries: int
    """Offset of the layer's entries inside a slab; block b's begin
    ``b * entries_per_block * entry_nbytes`` later."""
    block_keys: int
    """Offset of its indexer keys inside a slab."""
    window: int
    """Offset in a state: ring of ``window_slots`` entries in the entry format, slot = position %
    window_slots."""
    raw: int
    """Offset in a state: ring of ``raw_slots`` rows, slot = position % raw_slots; a row is
    ``raw_columns`` float32 values, then as many pooling scores (positional bias included)."""
    raw_index: int
    """The same ring for the indexer's compressor, ``raw_index_columns`` wide."""
    raw_slots: int
    raw_columns: int
    raw_index_columns: int


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """Layouts of all layers, MTP blocks last, and the sizes that follow."""

    entry_format: EntryFormat
    key_format: KeyFormat
    entry_nbytes: int
    key_nbytes: int
    window: int
    window_slots: int
    slab_blocks: int
    slab_nbytes: int
    state_nbytes: int
    pending_streams: int
    """Offset in a state: ring of ``pending_slots`` rows [streams, hidden] float32, slot =
    position % pending_slots, of the last tokens fed, for the MTP block; to the state's end."""
    pending_slots: int
    layers: tuple[LayerLayout, ...]

    @property
    def block_nbytes(self) -> int:
        """Bytes one block takes: what the context costs per ``BLOCK_TOKENS`` tokens."""
        return sum(
            layer.entries_per_block
            * (self.entry_nbytes + (self.key_nbytes if layer.block_keys >= 0 else 0))
            for layer in self.layers
        )


def cache_layout(
    *,
    ratios: tuple[int, ...],
    head_dim: int,
    rope_dim: int,
    index_dim: int,
    window: int,
    streams: int,
    hidden: int,
    entry_format: EntryFormat = "fp32",
    key_format: KeyFormat = "int8",
    slab_blocks: int = 64,
) -> CacheLayout:
    """The layout for layers of these compression ratios (0 none, 4 overlapping with an indexer).

    ratios: one per layer, MTP blocks last. streams, hidden: shape of the residual streams.
    Raises ValueError where a ratio does not divide a block.
    """
    entry, key = entry_nbytes(head_dim, rope_dim, entry_format), key_nbytes(index_dim, key_format)
    slab, state = 0, 0
    layers: list[LayerLayout] = []
    window_slots = window + MAX_REWIND
    for ratio in ratios:
        if ratio and BLOCK_TOKENS % ratio:
            raise ValueError(f"compress ratio {ratio} does not divide a block of {BLOCK_TOKENS}")
        overlapping = ratio == 4
        per_block = BLOCK_TOKENS // ratio if ratio else 0
        at_window = state
        state = _round_up(state + window_slots * entry, _ALIGNMENT)
        raw_slots = (2 * ratio if overlapping else ratio) + MAX_REWIND if ratio else 0
        columns = head_dim * (2 if overlapping else 1) if ratio else 0
        index_columns = 2 * index_dim if overlapping else 0
        at_raw, state = state, _round_up(state + raw_slots * columns * 8, _ALIGNMENT)
        at_index, state = state, _round_up(state + raw_slots * index_columns * 8, _ALIGNMENT)
        at_entries, slab = slab, _round_up(slab + slab_blocks * per_block * entry, _ALIGNMENT)
        at_keys = slab
        if overlapping:
            slab = _round_up(slab + slab_blocks * per_block * key, _ALIGNMENT)
        layers.append(
            LayerLayout(
                ratio=ratio,
                entries_per_block=per_block,
                block_entries=at_entries if ratio else -1,
                block_keys=at_keys if overlapping else -1,
                window=at_window,
                raw=at_raw if ratio else -1,
                raw_index=at_index if overlapping else -1,
                raw_slots=raw_slots,
                raw_columns=columns,
                raw_index_columns=index_columns,
            )
        )
    at_pending, state = state, _round_up(state + 4 * streams * hidden * _PENDING_SLOTS, _ALIGNMENT)
    return CacheLayout(
        entry_format=entry_format,
        key_format=key_format,
        entry_nbytes=entry,
        key_nbytes=key,
        window=window,
        window_slots=window_slots,
        slab_blocks=slab_blocks,
        slab_nbytes=slab,
        state_nbytes=state,
        pending_streams=at_pending,
        pending_slots=_PENDING_SLOTS,
        layers=tuple(layers),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
