"""The engine's cache: hands out memory to sequences and remembers what they computed.

The life of a sequence::

    sequence = cache.begin(prompt)            # shares what is known; sequence.plan says how much
    while ...:
        count = cache.max_feed(sequence, wanted)      # <= wanted: where a step must end
        if not cache.reserve(sequence, count): ...    # no memory: finish somebody, begin him later
        # one step over sequence.state, .block_table, .length; REPLAY while .is_replaying
        cache.commit(sequence, tokens)                # the tokens of the step that count
    cache.finish(sequence)

Finished blocks enter the tree (and the disk) as they are committed, so another prompt can share
them at once. Owned by the engine's thread; only the store's writer runs beside it. The network's
arithmetic and the choice of whom to run are other modules' business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rorqual.engine.cache.checkpoint import (
    checkpoint_nbytes,
    export_checkpoint,
    import_checkpoint,
)
from rorqual.engine.cache.config import Admission, CacheConfig, CacheStats
from rorqual.engine.cache.plan import (
    ReusePlan,
    checkpoint_share,
    last_boundary,
    next_stop,
    plan_reuse,
)
from rorqual.engine.cache.pool import BlockPool, Bytes, StatePool
from rorqual.engine.cache.prefix_tree import (
    DIGEST_NBYTES,
    KEY_NBYTES,
    TOKEN_NBYTES,
    Node,
    PrefixTree,
    chain,
)
from rorqual.engine.cache.sequence import SequenceCache
from rorqual.engine.cache.store import Store
from rorqual.kernels.layout import BLOCK_TOKENS, CacheLayout

_log = logging.getLogger(__name__)
_EVICTION_SHARE = 128
"""Evicting frees at least this fraction of the memory at once: choosing what goes is not free."""
_THINNING_SHARE = 16
"""The same of what dense checkpoints may take."""


class PrefixCache:
    """Memory of all sequences of one network, running and past. Use as a context manager.

    Args:
        fingerprint: what the contents depend on besides the layout: the weights and the numerics.
            Caches on disk are shared between processes with equal fingerprints.
        on_slab: called with every new slab of blocks, in order; see ``BlockPool``.

    Raises:
        ConfigError: the memory holds no block, or the directory cannot be used.
    """

    def __init__(
        self,
        layout: CacheLayout,
        config: CacheConfig,
        fingerprint: bytes,
        on_slab: Callable[[Bytes], None] | None = None,
    ) -> None:
        self.layout = layout
        self.config = config
        identity = _identity(layout, fingerprint)
        self.blocks = BlockPool(layout, config.memory_bytes, on_slab)
        self.states = StatePool(layout, config.max_sequences)
        self._tree = PrefixTree(identity, config.half_life_s)
        self._budget = config.memory_bytes
        self._replay_tokens = layout.window * len(layout.layers)
        self._checkpoint_bytes = 0
        self._totals = _Totals()
        self._store: Store | None = None
        if config.directory is not None:
            self._store = Store(
                config.directory,
                identity=identity,
                block_nbytes=layout.block_nbytes,
                checkpoint_nbytes=checkpoint_nbytes(layout),
                limit_bytes=config.disk_bytes,
            )

    # ---- a sequence's life --------------------------------------------------------------------
    def can_admit(self, num_tokens: int) -> Admission:
        """Whether a sequence that may grow to ``num_tokens`` fits beside those running.

        What they may still grow by is not reserved: ``reserve`` can fail later.
        """
        needed = -(-num_tokens // BLOCK_TOKENS)
        if needed > self.blocks.capacity:
            return Admission(
                "never",
                f"{num_tokens} tokens need {needed * self.blocks.block_nbytes} bytes of cache; "
                f"there are {self.blocks.capacity * self.blocks.block_nbytes}",
            )
        if self.states.num_free == 0:
            return Admission("later", f"{self.states.capacity} sequences are running already")
        free = self.blocks.num_free + self._num_evictable
        if needed > free:
            return Admission(
                "later",
                f"{num_tokens} tokens need {needed} blocks of cache; those running leave {free}",
            )
        return Admission("now")

    def begin(self, tokens: Sequence[int], *, is_resumed: bool = False) -> SequenceCache:
        """Start a sequence that will be fed ``tokens`` (at least one) from ``plan.restart`` on.

        A state must be free (``can_admit``). Reads from disk what memory does not have.
        is_resumed: it was preempted, and ``tokens`` are its prompt and its answer so far; the
            totals count a prompt once.
        """
        assert len(tokens) > 0, "an empty sequence has nothing to feed"
        data = array("i", tokens).tobytes()
        now = time.monotonic()
        state = self.states.acquire()
        nodes = self._tree.match(data, last_boundary(len(tokens)) // BLOCK_TOKENS)
        for node in nodes:  # held first: loading may evict
            self.blocks.share(node.block)
        self._load(nodes, data, last_boundary(len(tokens)) // BLOCK_TOKENS, now)
        at, checkpoint = self._deepest_checkpoint(nodes)
        plan = plan_reuse(
            prompt_tokens=len(tokens),
            matched_tokens=len(nodes) * BLOCK_TOKENS,
            checkpoint=at,
            replay_tokens=self._replay_tokens,
        )
        if plan.from_checkpoint:
            assert checkpoint is not None
            import_checkpoint(self.layout, checkpoint, plan.restart, state)
        self._tree.use(nodes, now)
        sequence = SequenceCache(plan, state, data[: plan.restart * TOKEN_NBYTES], nodes)
        if self._store is not None:
            self._store.use([node.digest for node in nodes])
            self._save(sequence)
        if not is_resumed:
            self._totals.add(plan)
        return sequence

    def max_feed(self, sequence: SequenceCache, wanted: int) -> int:
        """How many of the next ``wanted`` tokens one step may feed, 1..wanted.

        A step must not mix replayed and new tokens, and must end where a checkpoint is due.
        Drafted tokens count: what is taken back later must not have crossed such a place.
        """
        end = sequence.length + wanted
        if sequence.is_replaying:
            end = min(end, sequence.plan.matched_tokens)
        stop = next_stop(self.config.policy, sequence.plan, sequence.length)
        return (end if stop is None else min(end, stop)) - sequence.length

    def reserve(self, sequence: SequenceCache, num_tokens: int) -> bool:
        """Make the block table cover ``num_tokens`` more, evicting what nobody holds.

        False, and nothing has changed, if there is not enough memory: finish or preempt another.
        """
        needed = -(-(sequence.length + num_tokens) // BLOCK_TOKENS) - sequence.num_blocks
        if needed <= 0:
            return True
        blocks = self._acquire(needed)
        if blocks is None:
            return False
        sequence.extend(blocks)
        return True

    def commit(self, sequence: SequenceCache, tokens: Sequence[int]) -> None:
        """``tokens`` have been fed from ``sequence.length`` on and are there to stay.

        At most what ``max_feed`` allowed; fewer than were fed if drafted ones were rejected, for
        then the state holds what precedes them and the next step writes over the rest.
        """
        assert sequence.is_open
        assert len(tokens) <= self.max_feed(sequence, max(1, len(tokens))), "crossed a stop"
        sequence.push(tokens)
        assert sequence.length <= sequence.num_blocks * BLOCK_TOKENS, "not reserved"
        while (len(sequence.nodes) + 1) * BLOCK_TOKENS <= sequence.length:
            self._enter(sequence)
        self._save(sequence)
        if len(tokens) > 0 and sequence.length % BLOCK_TOKENS == 0:
            self._take_checkpoint(sequence)

    def finish(self, sequence: SequenceCache) -> None:
        """End or preempt a sequence: its memory is free, its whole blocks stay while there is room.

        Its state may be spoilt, as after a failed step: only what was committed is kept.
        """
        assert sequence.is_open, "finished twice"
        sequence.is_open = False
        self._save(sequence)
        if sequence.pending_checkpoint is not None:
            whole = sequence.length // BLOCK_TOKENS
            self._keep(sequence.nodes[whole - 1], sequence.pending_checkpoint, 1.0)
            sequence.pending_checkpoint = None
        for block in sequence.block_table.tolist():
            self.blocks.release(block)
        self.states.release(sequence.state)

    # ---- the whole ----------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget everything that no running sequence holds; what is on disk stays there."""
        for shed in self._tree.shed(time.monotonic(), self._is_held, self.blocks.block_nbytes):
            self._free(shed.checkpoint, shed.block)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until all finished blocks are on disk. Raises TimeoutError."""
        if self._store is not None:
            self._store.flush(timeout_s)

    def close(self) -> None:
        """Write what is queued and let go of the directory. Idempotent. Raises TimeoutError."""
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stats(self) -> CacheStats:
        """Sizes now and totals so far."""
        totals = self._totals
        return CacheStats(
            prompt_tokens=totals.cached + totals.replayed + totals.missed,
            cached_tokens=totals.cached,
            replayed_tokens=totals.replayed,
            missed_tokens=totals.missed,
            num_blocks=self.blocks.num_used,
            num_tree_blocks=self._tree.num_nodes,
            num_held_blocks=self.blocks.num_used - self._num_evictable,
            capacity_blocks=self.blocks.capacity,
            block_bytes=self.blocks.num_used * self.blocks.block_nbytes,
            checkpoint_bytes=self._checkpoint_bytes,
            num_evicted_blocks=totals.evicted_blocks,
            num_evicted_checkpoints=totals.evicted_checkpoints,
            num_loaded_blocks=totals.loaded_blocks,
            disk=None if self._store is None else self._store.stats(),
        )

    # ---- inside -------------------------------------------------------------------------------
    @property
    def _num_evictable(self) -> int:
        """Blocks only the tree holds: a block with two holders is held by it and a sequence."""
        return self._tree.num_nodes - self.blocks.num_shared

    def _is_held(self, node: Node) -> bool:
        return self.blocks.holders(node.block) > 1

    def _load(self, nodes: list[Node], data: bytes, max_blocks: int, now: float) -> None:
        """Continue the match ``nodes`` with blocks from disk, as far as memory lasts."""
        if self._store is None or len(nodes) == max_blocks:
            return
        self._store.refresh()
        node = nodes[-1] if nodes else self._tree.root
        for begin in range(len(nodes) * KEY_NBYTES, max_blocks * KEY_NBYTES, KEY_NBYTES):
            key = data[begin : begin + KEY_NBYTES]
            digest = chain(node.digest, key)
            if not self._store.has("block", digest):
                return
            found = self._store.read("block", digest)
            if found is None:
                self._weed(digest, data[begin + KEY_NBYTES : max_blocks * KEY_NBYTES])
                return
            acquired = self._acquire(1)
            if acquired is None:
                return
            block = acquired[0]
            self.blocks.write_block(block, found)
            node = self._tree.add(node, key, block, now)
            self.blocks.share(block)
            nodes.append(node)
            self._totals.loaded_blocks += 1

    def _weed(self, digest: bytes, data: bytes) -> None:
        """After a damaged block: look at those that follow, too, so that the sequence about to
        compute them writes all that are damaged again, not one after each restart."""
        assert self._store is not None
        for begin in range(0, len(data), KEY_NBYTES):
            digest = chain(digest, data[begin : begin + KEY_NBYTES])
            self._store.read("block", digest)

    def _deepest_checkpoint(self, nodes: Sequence[Node]) -> tuple[int, bytes | Bytes | None]:
        """Its position and contents; (0, None) if there is none worth more than a replay."""
        for count in range(len(nodes), 0, -1):
            if count * BLOCK_TOKENS < len(nodes) * BLOCK_TOKENS - self._replay_tokens:
                break
            node = nodes[count - 1]
            if node.checkpoint is not None:
                return count * BLOCK_TOKENS, node.checkpoint
            if self._store is not None:
                found = self._store.read("checkpoint", node.digest)
                if found is not None:
                    return count * BLOCK_TOKENS, found
        return 0, None

    def _enter(self, sequence: SequenceCache) -> None:
        """Put the sequence's next whole block into the tree, or use the one that is there."""
        index = len(sequence.nodes)
        parent = sequence.nodes[-1] if sequence.nodes else self._tree.root
        key, own = sequence.key(index), int(sequence.block_table[index])
        node = self._tree.child(parent, key)
        if node is None:
            node = self._tree.add(parent, key, own, time.monotonic())
            self.blocks.share(own)
        else:  # another sequence was faster; results do not depend on the batch, nor bytes
            self.blocks.share(node.block)
            self.blocks.release(own)
            sequence.replace(index, node.block)
        sequence.nodes.append(node)

    def _take_checkpoint(self, sequence: SequenceCache) -> None:
        """At a block boundary: keep what it takes to restart here, if the policy wants it."""
        at, plan, policy = sequence.length, sequence.plan, self.config.policy
        sequence.pending_checkpoint = None
        if at < plan.exact_from:
            return
        node = sequence.nodes[at // BLOCK_TOKENS - 1]
        share = checkpoint_share(policy, plan, at)
        may_be_last = policy.at_ends and share < 1 and at > last_boundary(plan.prompt_tokens)
        if not share and not may_be_last:
            return
        try:
            checkpoint = export_checkpoint(self.layout, sequence.state, at)
        except OSError as error:
            _log.warning("windows are not kept at token %d: %s", at, error)
            return
        if may_be_last:
            sequence.pending_checkpoint = checkpoint
        if share:
            self._keep(node, checkpoint, share)

    def _keep(self, node: Node, checkpoint: Bytes, share: float) -> None:
        is_dense = share < 1
        if self._store is not None and not is_dense:
            self._store.offer("checkpoint", node.digest, node.digest, checkpoint.tobytes())
        if node.checkpoint is not None:
            node.share = max(node.share, share)
            return
        make_room = self._thin_out if is_dense else self._make_room
        if make_room(checkpoint.nbytes):
            self._tree.keep_checkpoint(node, checkpoint, share)
            self._checkpoint_bytes += checkpoint.nbytes

    def _save(self, sequence: SequenceCache) -> None:
        """Offer whole blocks to the disk, in order, as far as its queue takes them."""
        if self._store is None or sequence.num_saved == len(sequence.nodes):
            return
        waiting = sequence.nodes[sequence.num_saved :]
        sequence.num_saved += self._store.num_known([node.digest for node in waiting])
        for node in sequence.nodes[sequence.num_saved :]:
            assert node.parent is not None
            data = self.blocks.read_block(node.block)
            if not self._store.offer("block", node.digest, node.parent.digest, data):
                return
            sequence.num_saved += 1

    def _acquire(self, count: int) -> list[int] | None:
        """New blocks; None, and none taken, if there is not enough memory."""
        if not self._make_room(count * self.blocks.block_nbytes):
            return None
        acquired: list[int] = []
        try:
            for _ in range(count):
                acquired.append(self.blocks.acquire())
        except OSError as error:  # then the budget is what there is: evict from now on
            for block in acquired:
                self.blocks.release(block)
            self._budget = self._used_bytes
            _log.warning("the cache stays at %d MiB: %s", self._budget >> 20, error)
            return self._acquire(count)
        return acquired

    def _make_room(self, nbytes: int) -> bool:
        """Evict until ``nbytes`` more fit; False, with nothing evicted, if they cannot."""
        budget, block_nbytes = self._budget, self.blocks.block_nbytes
        held = (self.blocks.num_used - self._num_evictable) * block_nbytes
        if held + nbytes > budget:
            return False
        if self._used_bytes + nbytes <= budget:
            return True
        room = min(max(nbytes, budget // _EVICTION_SHARE), budget - held)
        for shed in self._tree.shed(time.monotonic(), self._is_held, block_nbytes):
            self._free(shed.checkpoint, shed.block)
            self._totals.evicted_blocks += shed.block >= 0
            self._totals.evicted_checkpoints += shed.checkpoint is not None
            if self._used_bytes + room <= budget:
                break
        return True

    def _thin_out(self, nbytes: int) -> bool:
        """Make room for a dense checkpoint at the cost of other checkpoints only."""
        limit = min(
            int(self.config.dense_share * self._budget),
            self._budget - self.blocks.num_used * self.blocks.block_nbytes,
        )
        if nbytes > limit:
            return False
        if self._checkpoint_bytes + nbytes <= limit:
            return True
        room = max(nbytes, limit // _THINNING_SHARE)
        for shed in self._tree.shed(time.monotonic(), lambda _: True, self.blocks.block_nbytes):
            self._free(shed.checkpoint, shed.block)
            self._totals.evicted_checkpoints += 1
            if self._checkpoint_bytes + room <= limit:
                break
        return True

    @property
    def _used_bytes(self) -> int:
        return self.blocks.num_used * self.blocks.block_nbytes + self._checkpoint_bytes

    def _free(self, checkpoint: Bytes | None, block: int) -> None:
        if checkpoint is not None:
            self._checkpoint_bytes -= checkpoint.nbytes
        if block >= 0:
            self.blocks.release(block)


@dataclass
class _Totals:
    cached: int = 0
    replayed: int = 0
    missed: int = 0
    evicted_blocks: int = 0
    evicted_checkpoints: int = 0
    loaded_blocks: int = 0

    def add(self, plan: ReusePlan) -> None:
        """Count a sequence begun."""
        self.cached += plan.cached_tokens
        self.replayed += plan.replayed_tokens
        self.missed += plan.missed_tokens


def _identity(layout: CacheLayout, fingerprint: bytes) -> bytes:
    """What must be equal for bytes to mean the same: the model, and what blocks and checkpoints
    are made of. Where they lie in a slab or a state does not matter."""
    parts = [
        BLOCK_TOKENS, layout.entry_format, layout.key_format, layout.entry_nbytes,
        layout.key_nbytes, layout.window, layout.state_nbytes - layout.pending_streams,
        [[layer.ratio, layer.entries_per_block, layer.block_keys >= 0, layer.raw_columns,
          layer.raw_index_columns] for layer in layout.layers],
    ]  # fmt: skip
    return hashlib.blake2b(
        json.dumps(parts).encode() + b"\0" + fingerprint, digest_size=DIGEST_NBYTES
    ).digest()
