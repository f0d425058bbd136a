"""What a cache may take, and the numbers it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rorqual.engine.cache.plan import CheckpointPolicy
from rorqual.engine.cache.store import StoreStats
from rorqual.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Bounds of a ``PrefixCache``.

    Raises:
        ConfigError: a bound is out of range.
    """

    memory_bytes: int
    """Blocks and checkpoints together. States come on top: ``max_sequences`` of fixed size, each
    with at most one checkpoint that is not in the tree yet."""
    max_sequences: int = 8
    """Sequences that hold a state at the same time."""
    policy: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    dense_share: float = 0.125
    """Of ``memory_bytes``: a dense checkpoint is kept while all checkpoints fit into this, at the
    cost of others, never of entries."""
    half_life_s: float = 600.0
    """After this time without a use, a cached block counts half."""
    directory: Path | None = None
    """Where the cache survives a restart; None keeps it in memory only."""
    disk_bytes: int = 16 << 30
    """Size the directory may grow to, for each model."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "max_sequences", "half_life_s", "disk_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.dense_share <= 1:
            raise ConfigError(f"dense_share must be 0 to 1, got {self.dense_share}")


class Admission(NamedTuple):
    """Whether a sequence can start: now, later when others have ended, or never."""

    verdict: Literal["now", "later", "never"]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """A snapshot; totals count from the start."""

    prompt_tokens: int
    """Of all sequences begun: the sum of the next three."""
    cached_tokens: int
    """Needed no computation."""
    replayed_tokens: int
    """Entries reused, windows computed again."""
    missed_tokens: int
    num_blocks: int
    """In use, by the tree or by sequences."""
    num_tree_blocks: int
    """Of prefixes kept for later."""
    num_held_blocks: int
    """Held by running sequences; the others can be evicted."""
    capacity_blocks: int
    block_bytes: int
    checkpoint_bytes: int
    num_evicted_blocks: int
    num_evicted_checkpoints: int
    num_loaded_blocks: int
    """Read from disk."""
    disk: StoreStats | None
