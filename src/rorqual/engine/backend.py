"""What the engine asks of whatever computes: memory for sequences, and steps over them.

Two implementations: ``torch_backend`` runs any network of this project on any device, without
reuse; ``native_backend`` is the CPU engine with the shared, durable cache. The engine decides what
runs; a backend decides nothing but whether there is memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rorqual.engine.cache.config import Admission


class Memory(Protocol):
    """One sequence's memory."""

    @property
    def length(self) -> int:
        """Tokens the network has seen and that are there to stay."""
        ...

    @property
    def num_cached(self) -> int:
        """Leading tokens that were not computed for this sequence."""
        ...


class Feed(NamedTuple):
    """The next tokens of one sequence."""

    memory: Memory
    tokens: Sequence[int]
    num_logits: int
    """How many of the last tokens' logits are wanted; 0 in the middle of a prompt."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes held now."""

    cache_bytes: int
    """All of it: running sequences and what is kept for later."""
    compressed_bytes: int
    """The part that grows with the context."""


class Backend(Protocol):
    """Not thread-safe; the engine's thread owns it."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Longest sequence."""
        ...

    @property
    def can_draft(self) -> bool:
        """Whether ``draft`` works and ``commit`` may take back tokens."""
        ...

    def admit(self, num_tokens: int) -> Admission:
        """Whether a sequence that may grow to ``num_tokens`` can begin. Any thread."""
        ...

    def begin(self, tokens: Sequence[int], *, is_resumed: bool = False) -> Memory:
        """Memory for a sequence that will be fed ``tokens`` from ``length`` on.

        is_resumed: it ran before and lost its memory; counts no cache hits.
        """
        ...

    def max_feed(self, memory: Memory, wanted: int) -> int:
        """How many of the next ``wanted`` tokens one step may feed, 1..wanted."""
        ...

    def reserve(self, memory: Memory, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` more; False if memory is short, and nothing changed."""
        ...

    def step(self, feeds: Sequence[Feed]) -> Tensor:
        """Float32 logits [sum of num_logits, V]; nothing counts before ``commit``."""
        ...

    def commit(self, memory: Memory, tokens: Sequence[int]) -> None:
        """The leading ``tokens`` of the last feed are there to stay; the rest is taken back."""
        ...

    def draft(self, memories: Sequence[Memory], next_tokens: Sequence[int]) -> list[int]:
        """A guess at the token after each ``next_tokens``, which follow what was committed."""
        ...

    def finish(self, memory: Memory) -> None:
        """The sequence ended or must give its memory back. Once per ``begin``."""
        ...

    def memory_use(self) -> MemoryUse:
        """Bytes held now."""
        ...

    def close(self) -> None:
        """Write what is to be kept and free the rest. Idempotent."""
        ...
