"""Runs a PyTorch network for the engine: every device and every format, no reuse of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rorqual.engine.backend import Feed, Memory, MemoryUse
from rorqual.engine.cache.config import Admission
from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.state import Segment, SequenceState

_MAX_THREADS = 1024


class Model(Protocol):
    """What is needed of a network; ``model.transformer.Transformer`` provides it."""

    @property
    def config(self) -> ModelConfig:
        """Vocabulary size and longest context."""
        ...

    def new_state(self) -> SequenceState:
        """The memory of an empty sequence."""
        ...

    def __call__(self, tokens_N: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Feed a ragged batch, advance its states, and return last-position logits [B, V]."""
        ...


class TorchMemory:
    """A sequence's state. The network advances it during the step, so nothing can be taken back."""

    def __init__(self, state: SequenceState) -> None:
        self.state = state
        self.num_cached = state.length
        self.length = state.length


class TorchBackend:
    """A ``Backend`` over a PyTorch network.

    device: where the model's parameters are. num_threads: within an operation, set on the thread
    that steps; None leaves torch's choice.

    Raises:
        ConfigError: no machine has so many threads.
    """

    def __init__(self, model: Model, device: str = "cpu", num_threads: int | None = None) -> None:
        if num_threads is not None and not 1 <= num_threads <= _MAX_THREADS:
            raise ConfigError(f"num_threads must be in 1..{_MAX_THREADS}, got {num_threads}")
        self._model = model
        self._device = device
        self._num_threads = num_threads
        self._open: list[TorchMemory] = []

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def max_context_tokens(self) -> int:
        return self._model.config.max_position_embeddings

    @property
    def can_draft(self) -> bool:
        return False

    def admit(self, num_tokens: int) -> Admission:
        return Admission("now")

    def begin(self, tokens: Sequence[int], *, is_resumed: bool = False) -> TorchMemory:
        memory = TorchMemory(self._model.new_state())
        self._open.append(memory)
        return memory

    def max_feed(self, memory: Memory, wanted: int) -> int:
        return wanted

    def reserve(self, memory: Memory, num_tokens: int) -> bool:
        return True

    def step(self, feeds: Sequence[Feed]) -> Tensor:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # OpenMP's count is per thread
        tokens = torch.tensor([t for feed in feeds for t in feed.tokens], device=self._device)
        logits_BV = self._model(
            tokens, [Segment(_state_of(feed.memory), len(feed.tokens)) for feed in feeds]
        )
        assert all(feed.num_logits <= 1 for feed in feeds), "the last position only"
        return logits_BV[[i for i, feed in enumerate(feeds) if feed.num_logits]]

    def commit(self, memory: Memory, tokens: Sequence[int]) -> None:
        assert isinstance(memory, TorchMemory)
        memory.length += len(tokens)

    def draft(self, memories: Sequence[Memory], next_tokens: Sequence[int]) -> list[int]:
        raise NotImplementedError("this backend cannot take tokens back")

    def finish(self, memory: Memory) -> None:
        self._open = [other for other in self._open if other is not memory]

    def memory_use(self) -> MemoryUse:
        states = [memory.state for memory in self._open]
        return MemoryUse(
            cache_bytes=sum(state.nbytes for state in states),
            compressed_bytes=sum(state.compressed_nbytes for state in states),
        )

    def close(self) -> None:
        self._open = []


def _state_of(memory: Memory) -> SequenceState:
    assert isinstance(memory, TorchMemory)
    return memory.state
