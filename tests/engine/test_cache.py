"""A cached, branched, preempted or restarted sequence is the same, byte for byte, as one alone."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from rorqual.engine.cache.cache import PrefixCache
from rorqual.engine.cache.checkpoint import checkpoint_nbytes
from rorqual.engine.cache.config import CacheConfig
from rorqual.engine.cache.plan import CheckpointPolicy, PolicyKind
from rorqual.engine.cache.pool import BlockPool, Bytes
from rorqual.engine.cache.sequence import SequenceCache
from rorqual.errors import ConfigError
from rorqual.kernels.layout import BLOCK_TOKENS, cache_layout
from rorqual.testing.fake_network import REPLAY, FakeNetwork

LAYOUT = cache_layout(
    ratios=(0, 4, 128, 0), head_dim=4, rope_dim=2, index_dim=32, window=72,
    streams=2, hidden=4, key_format="fp4", slab_blocks=4,
)  # fmt: skip
REPLAY_TOKENS = 72 * 4
"""More than two blocks: a boundary lies where replayed windows are not exact yet."""
NUM_BLOCKS = 200


class Rig:
    """A cache and a network that uses its memory."""

    def __init__(
        self,
        policy: CheckpointPolicy | None = None,
        *,
        num_blocks: int = NUM_BLOCKS,
        directory: Path | None = None,
        mtp: bool = True,
        fingerprint: bytes = b"model",
        dense_share: float = 0.125,
    ) -> None:
        self.network = FakeNetwork(LAYOUT, mtp=mtp)
        config = CacheConfig(
            memory_bytes=num_blocks * LAYOUT.block_nbytes,
            max_sequences=4,
            policy=policy or CheckpointPolicy(period_tokens=512),
            dense_share=dense_share,
            directory=directory,
            disk_bytes=64 << 20,
        )
        self.cache = PrefixCache(LAYOUT, config, fingerprint, self.network.add_slab)

    def feed(self, sequence: SequenceCache, tokens: Sequence[int], chunk: int = 200) -> bytes:
        """Bring ``sequence`` to the end of ``tokens``; what the network says there."""
        output = b""
        while sequence.length < len(tokens):
            count = self.cache.max_feed(sequence, min(chunk, len(tokens) - sequence.length))
            assert self.cache.reserve(sequence, count)
            part = tokens[sequence.length : sequence.length + count]
            output = self.step(sequence, part)
            self.cache.commit(sequence, part)
        return output

    def step(self, sequence: SequenceCache, part: Sequence[int]) -> bytes:
        flags = REPLAY if sequence.is_replaying else 0
        segment = (len(part), sequence.length, flags)
        return self.network.step(part, [segment], [sequence.state], [sequence.block_table])[0]

    def answer(self, tokens: Sequence[int], chunk: int = 200) -> tuple[bytes, SequenceCache]:
        """Run a whole request."""
        sequence = self.cache.begin(tokens)
        output = self.feed(sequence, tokens, chunk)
        self.cache.finish(sequence)
        return output, sequence

    def contents(self, sequence: SequenceCache) -> list[bytes]:
        """Its whole blocks."""
        whole = sequence.length // BLOCK_TOKENS
        return [self.cache.blocks.read_block(b) for b in sequence.block_table[:whole].tolist()]


def alone(tokens: Sequence[int], *, mtp: bool = True) -> tuple[bytes, list[bytes]]:
    """Output and whole blocks of one step over everything, with memory of its own."""
    network = FakeNetwork(LAYOUT, mtp=mtp)
    pool = BlockPool(LAYOUT, NUM_BLOCKS * LAYOUT.block_nbytes, network.add_slab)
    table = np.array([pool.acquire() for _ in range(len(tokens) // BLOCK_TOKENS + 1)], np.int32)
    state = np.zeros(LAYOUT.state_nbytes, np.uint8)
    output = network.step(tokens, [(len(tokens), 0, 0)], [state], [table])[0]
    return output, [pool.read_block(b) for b in table[: len(tokens) // BLOCK_TOKENS].tolist()]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def check(rig: Rig, tokens: Sequence[int], chunk: int = 200, *, mtp: bool = True) -> SequenceCache:
    sequence = rig.cache.begin(tokens)
    output = rig.feed(sequence, tokens, chunk)
    wanted, blocks = alone(tokens, mtp=mtp)
    assert output == wanted
    assert rig.contents(sequence) == blocks
    rig.cache.finish(sequence)
    return sequence


POLICIES: list[tuple[PolicyKind, bool]] = [
    ("full", True), ("periodic", True), ("periodic", False), ("zero", True), ("zero", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "at_ends"), POLICIES)
def test_repeat_next_turn_branch_and_trimmed_tail_equal_the_same_alone(
    kind: PolicyKind, at_ends: bool
) -> None:
    rig = Rig(CheckpointPolicy(kind=kind, period_tokens=384, at_ends=at_ends))
    first = prompt(1000)
    check(rig, first)
    for tokens in (
        first,
        first + prompt(300, seed=1),
        first[:517] + prompt(400, seed=2),
        first[:640],
        first[:641],
        first[:100],
    ):
        sequence = check(rig, tokens)
        shared = min(
            len(tokens) - 1, 1000, 517 if tokens[:600] != first[: len(tokens)][:600] else 1000
        )
        assert sequence.plan.matched_tokens == shared // BLOCK_TOKENS * BLOCK_TOKENS
        assert sequence.plan.replayed_tokens <= REPLAY_TOKENS


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_branches_equal_the_same_alone(data: st.DataObject) -> None:
    kind, at_ends = data.draw(st.sampled_from(POLICIES))
    rig = Rig(CheckpointPolicy(kind=kind, period_tokens=256, at_ends=at_ends))
    known = [prompt(data.draw(st.integers(1, 700)))]
    for seed in range(1, data.draw(st.integers(2, 5))):
        base = data.draw(st.sampled_from(known))
        cut = data.draw(st.integers(0, len(base)))
        known.append(base[:cut] + prompt(data.draw(st.integers(1, 300)), seed))
        check(rig, known[-1], chunk=data.draw(st.sampled_from([1, 7, 128, 500])))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 1500))
def test_a_branch_anywhere_computes_again_less_than_two_blocks(cut: int) -> None:
    rig = Rig(CheckpointPolicy(), dense_share=1.0)
    rig.answer(prompt(1500))
    sequence = check(rig, prompt(1500)[:cut] + prompt(100, seed=1))
    assert cut - sequence.plan.cached_tokens < 2 * BLOCK_TOKENS


def test_dense_checkpoints_thin_out_evenly_and_displace_no_entries() -> None:
    tokens = prompt(4000)
    size = checkpoint_nbytes(LAYOUT)
    limit = 6 * size
    rig = Rig(CheckpointPolicy(), dense_share=(limit + 1) / (NUM_BLOCKS * LAYOUT.block_nbytes))
    rig.answer(tokens)
    stats = rig.cache.stats()
    assert limit <= stats.checkpoint_bytes <= limit + size, "the last is for good, beyond the limit"
    assert (stats.num_evicted_blocks, stats.num_tree_blocks) == (0, 31)
    kept = {at for at in range(128, 3969, 128) if is_kept(rig, tokens[: at + 1])}
    assert {1024, 2048, 3072, 3968} < kept, "what is furthest apart, and the end, stay"


def is_kept(rig: Rig, tokens: Sequence[int]) -> bool:
    """Whether windows are kept right before the last of ``tokens``."""
    sequence = rig.cache.begin(tokens)
    rig.cache.finish(sequence)
    return sequence.plan.cached_tokens == len(tokens) - 1


def test_dense_checkpoints_are_not_kept_on_disk(tmp_path: Path) -> None:
    tokens = prompt(3000)
    rig = Rig(CheckpointPolicy(), directory=tmp_path, dense_share=1.0)
    rig.answer(tokens)
    assert all(is_kept(rig, tokens[: at + 1]) for at in (1024, 1792, 2048, 2944))
    rig.cache.close()
    rig = Rig(CheckpointPolicy(), directory=tmp_path, dense_share=1.0)
    kept = [is_kept(rig, tokens[: at + 1]) for at in (1024, 1792, 2048, 2944)]
    assert kept == [False, False, True, True]
    rig.cache.close()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), min_size=10, max_size=120))
def test_rejected_drafts_leave_no_trace(steps: list[tuple[int, int]]) -> None:
    """Each step feeds some drafted tokens, of which a prefix is kept."""
    rig = Rig(mtp=False)
    tokens = prompt(1000)
    sequence = rig.cache.begin(tokens[:100])
    rig.feed(sequence, tokens[:100])
    for drafted, kept in steps:
        count = rig.cache.max_feed(sequence, drafted + 1)
        kept = min(kept, count)
        at = sequence.length
        part = [*tokens[at : at + kept], *prompt(count - kept, seed=at)]
        assert rig.cache.reserve(sequence, count)
        rig.step(sequence, part)
        rig.cache.commit(sequence, tokens[at : at + kept])
    end = sequence.length + 1
    output = rig.feed(sequence, tokens[:end])
    wanted, blocks = alone(tokens[:end], mtp=False)
    assert output == wanted
    assert rig.contents(sequence) == blocks


def test_an_exact_repeat_computes_the_last_block_only() -> None:
    rig = Rig()
    for length in (1000, 1024):
        tokens = prompt(length, seed=length)
        rig.answer(tokens)
        fed = rig.network.num_tokens
        _, sequence = rig.answer(tokens)
        assert rig.network.num_tokens - fed == length - (length - 1) // 128 * 128
        assert sequence.plan.cached_tokens == (length - 1) // 128 * 128


def test_the_next_turn_goes_on_from_the_answers_last_block() -> None:
    rig = Rig(CheckpointPolicy(kind="zero"))
    tokens = prompt(900)
    sequence = rig.cache.begin(tokens[:300])
    rig.feed(sequence, tokens[:300])
    for _ in range(500):  # the answer, token by token
        rig.feed(sequence, tokens[: sequence.length + 1])
    rig.cache.finish(sequence)
    assert rig.cache.begin(tokens).plan.cached_tokens == 768


def test_a_prefix_two_prompts_share_is_remembered_at_its_end() -> None:
    rig = Rig(CheckpointPolicy(kind="zero"))
    base = prompt(1000)
    rig.answer(base)
    cached = [rig.answer(base[:600] + prompt(300, seed))[1].plan.cached_tokens for seed in (1, 2)]
    assert cached == [512 - REPLAY_TOKENS, 512]


def test_a_prompt_that_another_sequence_is_still_reading_is_shared() -> None:
    rig = Rig()
    tokens = prompt(700)
    one, other = rig.cache.begin(tokens), rig.cache.begin(tokens)
    rig.feed(one, tokens[:300])
    late = rig.cache.begin(tokens)
    assert late.plan.matched_tokens == 256
    outputs = [rig.feed(sequence, tokens) for sequence in (other, one, late)]
    assert set(outputs) == {alone(tokens)[0]}
    tables = {sequence.block_table[:5].tobytes() for sequence in (one, other, late)}
    assert len(tables) == 1, "whole blocks with the same contents are kept once"
    assert rig.cache.stats().num_blocks == 5 + 3
    for sequence in (one, other, late):
        rig.cache.finish(sequence)
    assert rig.cache.stats().num_blocks == 5


def test_a_preempted_sequence_goes_on_with_the_same_tokens() -> None:
    rig = Rig()
    tokens = prompt(1000)
    sequence = rig.cache.begin(tokens[:600])
    rig.feed(sequence, tokens[:700])
    rig.cache.finish(sequence)
    stats = rig.cache.stats()
    assert (rig.cache.states.num_used, stats.num_held_blocks) == (0, 0)
    rig.answer(prompt(900, seed=5))
    sequence = rig.cache.begin(tokens[:700], is_resumed=True)
    assert sequence.plan.cached_tokens == 640
    assert rig.feed(sequence, tokens) == alone(tokens)[0]
    assert rig.cache.stats().prompt_tokens == 600 + 900, "a resumed prompt is counted once"


def test_memory_is_never_exceeded_and_running_sequences_keep_theirs() -> None:
    rig = Rig(num_blocks=12)
    for seed in range(6):
        tokens = prompt(900, seed)
        output, _ = rig.answer(tokens)
        assert output == alone(tokens)[0]
        stats = rig.cache.stats()
        assert stats.block_bytes + stats.checkpoint_bytes <= 12 * LAYOUT.block_nbytes
    assert rig.cache.stats().num_evicted_blocks > 0
    running = rig.cache.begin(prompt(900, 5))
    rig.feed(running, prompt(900, 5)[:899])
    second = rig.cache.begin(prompt(900, 9))
    assert not rig.cache.reserve(second, 900)
    assert second.num_blocks == 0
    rig.cache.finish(running)
    assert rig.cache.reserve(second, 900)


def test_a_system_with_less_memory_than_the_budget_evicts_instead() -> None:
    rig = Rig()
    slabs: list[object] = []

    def add(slab: Bytes) -> None:
        if len(slabs) == 3:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        slabs.append(slab)
        rig.network.add_slab(slab)

    rig.cache = PrefixCache(LAYOUT, rig.cache.config, b"model", add)
    held = 3 * LAYOUT.slab_blocks * BLOCK_TOKENS
    greedy = rig.cache.begin(prompt(9))
    assert rig.cache.reserve(greedy, held)
    assert not rig.cache.reserve(greedy, held + 1)
    assert greedy.num_blocks == held // BLOCK_TOKENS
    rig.cache.finish(greedy)
    for seed in range(6):
        tokens = prompt(900, seed)
        assert rig.answer(tokens)[0] == alone(tokens)[0]
    assert rig.cache.stats().num_evicted_blocks > 0
    assert rig.cache.stats().num_held_blocks == 0


def test_admission_says_now_later_or_never() -> None:
    rig = Rig(num_blocks=10)
    assert rig.cache.can_admit(1280).verdict == "now"
    never = rig.cache.can_admit(1281)
    assert never.verdict == "never"
    assert "bytes" in never.reason
    rig.answer(prompt(1000))
    assert rig.cache.can_admit(1280).verdict == "now", "what nobody holds can be evicted"
    running = rig.cache.begin(prompt(500, 1))
    rig.feed(running, prompt(500, 1))
    assert rig.cache.can_admit(768).verdict == "now"
    assert rig.cache.can_admit(769).verdict == "later"
    others = [rig.cache.begin([1]) for _ in range(3)]
    assert "sequences are running" in rig.cache.can_admit(1).reason
    for sequence in (running, *others):
        rig.cache.finish(sequence)
    assert rig.cache.can_admit(1280).verdict == "now"


def test_a_restart_serves_from_disk_what_was_computed_before(tmp_path: Path) -> None:
    tokens = prompt(2000)
    with Rig(directory=tmp_path).cache as cache:
        rig = Rig(directory=tmp_path)
        rig.answer(tokens)
        rig.cache.close()
        # A process that was there before sees what another has written since.
        sequence = cache.begin(tokens)
        assert sequence.plan.cached_tokens == 1920
    rig = Rig(directory=tmp_path)
    sequence = check(rig, tokens)
    assert sequence.plan.cached_tokens == 1920
    assert rig.network.num_tokens == 80
    assert rig.cache.stats().num_loaded_blocks == 15
    rig.cache.close()
    stranger = Rig(directory=tmp_path, fingerprint=b"another model")
    assert check(stranger, tokens).plan.matched_tokens == 0
    stranger.cache.close()


def test_the_disk_brings_back_what_memory_had_to_forget(tmp_path: Path) -> None:
    with Rig(directory=tmp_path, num_blocks=12).cache as _:
        pass
    rig = Rig(directory=tmp_path, num_blocks=12)
    first = prompt(900)
    rig.answer(first)
    for seed in range(1, 4):
        rig.answer(prompt(900, seed))
    rig.cache.flush()
    assert rig.cache.stats().num_evicted_blocks > 0
    assert check(rig, first).plan.cached_tokens == 896
    rig.cache.close()


def test_windows_that_a_replay_has_not_filled_yet_are_not_kept(tmp_path: Path) -> None:
    tokens = prompt(1000)
    for kind, at_ends in (("zero", False), ("full", True)):
        rig = Rig(CheckpointPolicy(kind=kind, at_ends=at_ends), directory=tmp_path)
        sequence = check(rig, tokens)
        rig.cache.close()
    assert (sequence.plan.replayed_tokens, sequence.plan.restart) == (REPLAY_TOKENS, 608)
    rig = Rig(directory=tmp_path)
    for boundary in (640, 768, 896):
        check(rig, tokens[: boundary + 1])
    rig.cache.close()


def test_a_damaged_disk_costs_time_not_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = prompt(1500)
    rig = Rig(directory=tmp_path)
    rig.answer(tokens)
    rig.cache.close()
    for case in range(12):
        copy = tmp_path / f"copy{case}"
        shutil.copytree(next(tmp_path.glob("v1-*")), copy / next(tmp_path.glob("v1-*")).name)
        for path in copy.rglob("*.*"):
            data = bytearray(path.read_bytes())
            for at in rng.integers(0, len(data), 2):
                data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data[: rng.integers(len(data))] if case % 3 == 0 else data)
        rig = Rig(directory=copy)
        check(rig, tokens)
        rig.cache.close()
        cached = []
        for _ in range(4):
            rig = Rig(directory=copy)
            cached.append(rig.answer(tokens)[1].plan.cached_tokens)
            rig.cache.close()
        assert cached[-1] == 1408, "what was damaged was not written again"


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache directory"):
        Rig(directory=tmp_path / "file")


def test_misuse_is_caught() -> None:
    rig = Rig(CheckpointPolicy(kind="full"))
    sequence = rig.cache.begin(prompt(300))
    assert rig.cache.max_feed(sequence, 300) == 128
    with pytest.raises(AssertionError, match="crossed a stop"):
        rig.cache.commit(sequence, prompt(300))
    rig.cache.finish(sequence)
    with pytest.raises(AssertionError, match="finished twice"):
        rig.cache.finish(sequence)


class Operations(RuleBasedStateMachine):
    """Any order of operations frees everything exactly once and never mixes sequences up."""

    @initialize(num_blocks=st.integers(8, 30), disk=st.booleans(), policy=st.sampled_from(POLICIES))
    def start(self, num_blocks: int, disk: bool, policy: tuple[PolicyKind, bool]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rorqual-cache-")) if disk else None
        self.rig = Rig(
            CheckpointPolicy(kind=policy[0], period_tokens=256, at_ends=policy[1]),
            num_blocks=num_blocks,
            directory=self.directory,
        )
        self.known = [prompt(600)]
        self.open: list[tuple[SequenceCache, list[int]]] = []

    @precondition(lambda self: len(self.open) < 4)
    @rule(
        base=st.integers(0, 5),
        cut=st.integers(0, 900),
        more=st.integers(1, 400),
        steps=st.integers(0, 5),
    )
    def begin(self, base: int, cut: int, more: int, steps: int) -> None:
        tokens = self.known[base % len(self.known)][:cut] + prompt(more, base)
        self.known.append(tokens)
        self.open.append((self.rig.cache.begin(tokens), tokens))
        self.feed(-1, 300, steps)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3), count=st.integers(1, 300), steps=st.integers(1, 5))
    def feed(self, which: int, count: int, steps: int) -> None:
        sequence, tokens = self.open[which % len(self.open)]
        output = b""
        for _ in range(steps):
            if sequence.length == len(tokens):
                tokens.append(count)
            wanted = min(count, len(tokens) - sequence.length)
            fed = self.rig.cache.max_feed(sequence, wanted)
            if not self.rig.cache.reserve(sequence, fed):
                return
            part = tokens[sequence.length : sequence.length + fed]
            output = self.rig.step(sequence, part)
            self.rig.cache.commit(sequence, part)
        if output and sequence.length == len(tokens):
            assert output == alone(tokens)[0]

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3))
    def finish(self, which: int) -> None:
        self.rig.cache.finish(self.open.pop(which % len(self.open))[0])

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3))
    def preempt_and_resume(self, which: int) -> None:
        sequence, tokens = self.open[which % len(self.open)]
        self.rig.cache.finish(sequence)
        resumed = self.rig.cache.begin(tokens, is_resumed=True)
        self.open[which % len(self.open)] = resumed, tokens

    @rule(chance=st.integers(0, 5))
    def forget(self, chance: int) -> None:
        if chance == 5:
            self.rig.cache.clear()

    @invariant()
    def counts_are_those_of_the_holders(self) -> None:
        if not hasattr(self, "rig"):
            return
        cache = self.rig.cache
        wanted: dict[int, int] = {}
        for sequence, _ in self.open:
            for block in sequence.block_table.tolist():
                wanted[block] = wanted.get(block, 0) + 1
        for block in self.tree_blocks():
            wanted[block] = wanted.get(block, 0) + 1
        assert {b: cache.blocks.holders(b) for b in wanted} == wanted
        stats = cache.stats()
        assert stats.num_blocks == len(wanted)
        held = {b for s, _ in self.open for b in s.block_table.tolist()}
        assert stats.num_held_blocks == len(held)
        assert cache.states.num_used == len(self.open)
        assert stats.block_bytes + stats.checkpoint_bytes <= cache.config.memory_bytes

    def tree_blocks(self) -> list[int]:
        found, frontier = [], [self.rig.cache._tree.root]
        while frontier:
            children = list((frontier.pop().children or {}).values())
            found += [node.block for node in children]
            frontier += children
        return found

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for sequence, _ in self.open:
            self.rig.cache.finish(sequence)
        stats = self.rig.cache.stats()
        assert stats.num_blocks == stats.num_tree_blocks
        self.rig.cache.clear()
        stats = self.rig.cache.stats()
        assert (stats.num_blocks, stats.num_tree_blocks, stats.checkpoint_bytes) == (0, 0, 0)
        self.rig.cache.close()
        if self.directory is not None:
            shutil.rmtree(self.directory)


Operations.TestCase.settings = settings(deadline=None, max_examples=20, stateful_step_count=20)
TestOperations = Operations.TestCase
