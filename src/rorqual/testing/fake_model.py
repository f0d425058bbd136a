"""A stand-in for the network: instant, deterministic, and sensitive to every token it was fed.

The next token's logits are a pseudo-random function of the exact sequence so far, so an engine
that mixes up, repeats or loses a token of any sequence's state gives different tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rorqual.model.config import TINY, ModelConfig
from rorqual.model.state import Segment, SequenceState

_PRIME = (1 << 61) - 1


class FakeState(SequenceState):
    """The tokens seen."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.tokens: list[int] = []
        self.digest = 1
        """Differs for every sequence of tokens."""

    def push(self, token: int) -> None:
        """Append one token."""
        self.tokens.append(token)
        self.digest = (self.digest * 1_000_003 + token + 7) % _PRIME
        self.length += 1

    @property
    def nbytes(self) -> int:
        """Eight per token."""
        return 8 * self.length


class FakeModel:
    """Satisfies ``engine.Model`` without a network.

    Args:
        before_forward: called with each batch's tokens [N] before anything changes; raise from it
            to play a failing model, block in it to hold the engine at a step.
    """

    def __init__(
        self,
        config: ModelConfig = TINY,
        *,
        before_forward: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.config = config
        self.batches: list[tuple[int, ...]] = []
        """Tokens per segment of every batch so far."""
        self._before_forward = before_forward

    def new_state(self) -> SequenceState:
        """An empty sequence."""
        return FakeState()

    def __call__(self, tokens_N: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Float32 logits [B, V] after each segment."""
        tokens: list[int] = tokens_N.tolist()
        if self._before_forward is not None:
            self._before_forward(tokens)
        self.batches.append(tuple(segment.num_tokens for segment in segments))
        rows: list[Tensor] = []
        at = 0
        for segment in segments:
            assert isinstance(segment.state, FakeState)
            for token in tokens[at : at + segment.num_tokens]:
                segment.state.push(token)
            at += segment.num_tokens
            rows.append(self.logits_after(segment.state))
        assert at == len(tokens), "segments do not cover the batch"
        return torch.stack(rows)

    def logits_after(self, state: FakeState) -> Tensor:
        """Float32 [V]: what follows the tokens in ``state``."""
        generator = torch.Generator().manual_seed(state.digest)
        return 2.0 * torch.randn(self.config.vocab_size, generator=generator)


class ScriptedModel(FakeModel):
    """Always continues as ``script`` says, for tests of what stands behind an engine.

    Args:
        script: from all tokens of a sequence so far to the one that certainly follows.
    """

    def __init__(self, script: Callable[[Sequence[int]], int], config: ModelConfig = TINY) -> None:
        super().__init__(config)
        self._script = script

    def logits_after(self, state: FakeState) -> Tensor:
        """All probability on the scripted token."""
        logits = torch.full((self.config.vocab_size,), -1e9)
        logits[self._script(state.tokens)] = 0.0
        return logits
