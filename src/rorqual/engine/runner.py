"""One step's forward pass: the scheduled tokens of every sequence as one ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.engine.sequence import RunningSequence
from rorqual.model.config import ModelConfig
from rorqual.model.state import Segment, SequenceState


class Model(Protocol):
    """What the engine needs of a network; ``model.transformer.Transformer`` provides it."""

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


class Work(NamedTuple):
    """Feed the next ``num_tokens`` pending tokens of ``sequence``."""

    sequence: RunningSequence
    num_tokens: int


def forward(model: Model, batch: Sequence[Work], device: str) -> Tensor:
    """Logits [B, V] after each piece of work; advances the sequences' states."""
    tokens = [token for work in batch for token in work.sequence.next_tokens(work.num_tokens)]
    segments = [Segment(work.sequence.state, work.num_tokens) for work in batch]
    return model(torch.tensor(tokens, device=device), segments)
