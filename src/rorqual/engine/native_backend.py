"""Runs a network on the native CPU engine, with memory from the shared, durable cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.backend import Feed, Memory, MemoryUse
from rorqual.engine.cache.cache import PrefixCache
from rorqual.engine.cache.config import Admission, CacheConfig, CacheStats
from rorqual.engine.cache.sequence import SequenceCache
from rorqual.errors import ConfigError
from rorqual.kernels.layout import BLOCK_TOKENS
from rorqual.model.native import ADVANCE_DRAFT, REPLAY, NativeNetwork, NativeSegment
from rorqual.model.transformer import Transformer


class NativeMemory:
    """A sequence's part of the cache."""

    def __init__(self, sequence: SequenceCache) -> None:
        self.sequence = sequence
        self.num_cached = sequence.plan.cached_tokens

    @property
    def length(self) -> int:
        """Tokens consumed and committed."""
        return self.sequence.length

    def segment(self, num_tokens: int, start: int, flags: int = 0) -> NativeSegment:
        """What the network is given for the next tokens."""
        return NativeSegment(
            num_tokens, start, self.sequence.state, self.sequence.block_table, flags
        )


class NativeBackend:
    """A ``Backend`` over ``NativeNetwork`` and ``PrefixCache``.

    fingerprint: of the weights, see ``fingerprint_of``; matters only for a cache on disk.
    drafts: keep the MTP block's memory, so that ``draft`` works.

    Raises:
        ConfigError: the cache's memory or directory will not do, or it is on disk and there is no
            fingerprint.
    """

    def __init__(
        self,
        network: NativeNetwork,
        config: CacheConfig,
        *,
        fingerprint: bytes = b"",
        drafts: bool = True,
    ) -> None:
        if config.directory is not None and not fingerprint:
            raise ConfigError("a cache on disk needs a fingerprint: other weights must not match")
        self._network = network
        identity = fingerprint + network.weight_format.encode()
        self._cache = PrefixCache(network.layout, config, identity, on_slab=network.add_slab)
        self._flags = ADVANCE_DRAFT if drafts and network.config.num_nextn_predict_layers else 0
        self._num_states = 0

    @property
    def vocab_size(self) -> int:
        return self._network.config.vocab_size

    @property
    def max_context_tokens(self) -> int:
        held = self._cache.blocks.capacity * BLOCK_TOKENS
        return min(self._network.config.max_position_embeddings, held)

    @property
    def can_draft(self) -> bool:
        return self._flags != 0

    def admit(self, num_tokens: int) -> Admission:
        return self._cache.can_admit(num_tokens)

    def begin(self, tokens: Sequence[int], *, is_resumed: bool = False) -> NativeMemory:
        memory = NativeMemory(self._cache.begin(tokens, is_resumed=is_resumed))
        self._num_states += 1
        return memory

    def max_feed(self, memory: Memory, wanted: int) -> int:
        return self._cache.max_feed(_sequence_of(memory), wanted)

    def reserve(self, memory: Memory, num_tokens: int) -> bool:
        return self._cache.reserve(_sequence_of(memory), num_tokens)

    def step(self, feeds: Sequence[Feed]) -> Tensor:
        segments: list[NativeSegment] = []
        tokens: list[int] = []
        rows: list[int] = []
        for memory, fed, num_logits in feeds:
            assert isinstance(memory, NativeMemory)
            flags = self._flags | (REPLAY if memory.sequence.is_replaying else 0)
            segments.append(memory.segment(len(fed), memory.length, flags))
            tokens += fed
            rows += range(len(tokens) - num_logits, len(tokens))
        logits_RV = self._network.step(
            np.array(tokens, np.int32), segments, np.array(rows, np.int64)
        )
        return torch.from_numpy(logits_RV)

    def commit(self, memory: Memory, tokens: Sequence[int]) -> None:
        self._cache.commit(_sequence_of(memory), tokens)

    def draft(self, memories: Sequence[Memory], next_tokens: Sequence[int]) -> list[int]:
        segments = []
        for memory in memories:
            assert isinstance(memory, NativeMemory)
            segments.append(memory.segment(1, memory.length - 1))
        logits_SV = self._network.draft(np.array(next_tokens, np.int32), segments)
        guesses: list[int] = logits_SV.argmax(-1).tolist()
        return guesses

    def finish(self, memory: Memory) -> None:
        self._cache.finish(_sequence_of(memory))
        self._num_states -= 1

    def memory_use(self) -> MemoryUse:
        stats, layout = self._cache.stats(), self._network.layout
        blocks = stats.num_held_blocks * layout.block_nbytes
        states = self._num_states * layout.state_nbytes
        return MemoryUse(
            cache_bytes=stats.block_bytes + stats.checkpoint_bytes + states, compressed_bytes=blocks
        )

    def cache_stats(self) -> CacheStats:
        """Everything the cache counts."""
        return self._cache.stats()

    def flush(self) -> None:
        """Wait until all finished blocks are on disk."""
        self._cache.flush()

    def close(self) -> None:
        self._cache.close()


def fingerprint_of(model: Transformer) -> bytes:
    """A digest of config and weights: with the formats, all that a cache's contents depend on."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _sequence_of(memory: Memory) -> SequenceCache:
    assert isinstance(memory, NativeMemory)
    return memory.sequence
