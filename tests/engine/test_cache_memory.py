"""Blocks, states and checkpoints: every byte has one owner and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.cache.checkpoint import (
    checkpoint_nbytes,
    export_checkpoint,
    import_checkpoint,
)
from rorqual.engine.cache.pool import BlockPool, Bytes, StatePool
from rorqual.errors import ConfigError
from rorqual.kernels.layout import BLOCK_TOKENS, CacheLayout, EntryFormat, cache_layout


def layout(window: int = 128, entry_format: EntryFormat = "fp32") -> CacheLayout:
    return cache_layout(
        ratios=(0, 4, 128, 4, 0), head_dim=16, rope_dim=8, index_dim=32, window=window,
        streams=4, hidden=8, entry_format=entry_format, key_format="fp4", slab_blocks=4,
    )  # fmt: skip


def test_blocks_come_back_as_written_and_do_not_touch_each_other() -> None:
    pool = BlockPool(layout(), 10 * layout().block_nbytes)
    rng = np.random.default_rng(0)
    blocks = [pool.acquire() for _ in range(10)]
    contents = [rng.bytes(pool.block_nbytes) for _ in blocks]
    for block, data in zip(blocks, contents, strict=True):
        pool.write_block(block, data)
    assert [pool.read_block(block) for block in blocks] == contents
    assert sorted(blocks) == list(range(10))


def test_blocks_lie_where_the_layout_says() -> None:
    shape, slabs = layout(), []
    pool = BlockPool(shape, 8 * shape.block_nbytes, slabs.append)
    for _ in range(6):
        pool.acquire()
    for i, slab in enumerate(slabs):
        slab[:] = i
    assert len(slabs) == 2
    slab, index = slabs[1], 1  # block 5
    wanted = []
    for layer in shape.layers:
        for at, size in (
            (layer.block_entries, shape.entry_nbytes),
            (layer.block_keys, shape.key_nbytes),
        ):
            if at >= 0:
                part = slab[at + index * layer.entries_per_block * size :]
                part = part[: layer.entries_per_block * size]
                part[:] = len(wanted) + 10
                wanted.append(part)
    assert pool.read_block(5) == b"".join(part.tobytes() for part in wanted)
    assert set(pool.read_block(4)) == {1}


def test_a_freed_slab_costs_nothing_and_low_numbers_are_used_first() -> None:
    shape, slabs = layout(), []
    pool = BlockPool(shape, 12 * shape.block_nbytes, slabs.append)
    blocks = [pool.acquire() for _ in range(12)]
    for slab in slabs:
        slab[:] = 7
    for block in blocks[2:]:
        pool.release(block)
    assert slabs[0].all()
    assert not slabs[1].any(), "the system did not get the empty slab back"
    assert [pool.acquire() for _ in range(3)] == [2, 3, 4]


def test_counts_follow_holders_and_misuse_is_caught() -> None:
    pool = BlockPool(layout(), 2 * layout().block_nbytes)
    block = pool.acquire()
    pool.share(block)
    assert (pool.holders(block), pool.num_shared, pool.num_used) == (2, 1, 1)
    pool.release(block)
    pool.release(block)
    assert (pool.holders(block), pool.num_shared, pool.num_used) == (0, 0, 0)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(block)
    with pytest.raises(AssertionError, match="free"):
        pool.share(block)
    with pytest.raises(AssertionError, match="free"):
        pool.read_block(block)
    pool.acquire()
    pool.acquire()
    with pytest.raises(AssertionError, match="no free block"):
        pool.acquire()


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no block"):
        BlockPool(layout(), layout().block_nbytes - 1)


def test_states_are_zero_whoever_had_them_before() -> None:
    pool = StatePool(layout(), 2)
    first = pool.acquire()
    first[:] = 9
    pool.release(first)
    second, third = pool.acquire(), pool.acquire()
    assert not second.any()
    assert not third.any()
    assert pool.num_free == 0
    pool.release(second)
    with pytest.raises(AssertionError, match="not handed out"):
        pool.release(second)


def rows(state: Bytes, at: int, slots: int, size: int, positions: range) -> list[bytes]:
    found = []
    for position in positions:
        begin = at + position % slots * size
        found.append(state[begin : begin + size].tobytes())
    return found


@settings(deadline=None, max_examples=60)
@given(
    boundary=st.integers(1, 40),
    window=st.sampled_from([8, 100, 128, 129, 256]),
    entry_format=st.sampled_from(["fp32", "bf16", "record"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_checkpoint_restores_every_slot_a_restart_reads(
    boundary: int, window: int, entry_format: EntryFormat, seed: int
) -> None:
    shape, position = layout(window, entry_format), boundary * BLOCK_TOKENS
    rng = np.random.default_rng(seed)
    state = rng.integers(0, 256, shape.state_nbytes, dtype=np.uint8)
    restored = np.zeros_like(state)
    data = export_checkpoint(shape, state, position)
    assert len(data) == checkpoint_nbytes(shape)
    import_checkpoint(shape, data.tobytes(), position, restored)
    for layer in shape.layers:
        last = range(position - window, position)
        args = (layer.window, shape.window_slots, shape.entry_nbytes, last)
        assert rows(restored, *args) == rows(state, *args)
        if layer.ratio == 4:
            for at, columns in (
                (layer.raw, layer.raw_columns),
                (layer.raw_index, layer.raw_index_columns),
            ):
                group = (at, layer.raw_slots, 8 * columns, range(position - 4, position))
                assert rows(restored, *group) == rows(state, *group)
    pending = slice(shape.pending_streams, shape.state_nbytes)
    assert restored[pending].tobytes() == state[pending].tobytes()
    assert np.array_equal(export_checkpoint(shape, restored, position), data)
