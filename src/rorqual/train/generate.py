"""Greedy generation of many answers at once, for evaluation during and after training.

Every step is one ragged batch of prompts that start and answers that continue. The state after a
beginning that several prompts share is computed once and copied. Not an engine: no sampling, no
streaming, no limit on memory; the caller groups its prompts.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rorqual.model.state import Segment, SequenceState
from rorqual.model.transformer import Transformer

_CHUNK_TOKENS = 4096
"""Prompt tokens that start in one step, one prompt at least; bounds the activations' memory."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One answer: its ids without the stop token, and whether that token ended it."""

    ids: tuple[int, ...]
    stopped: bool


@dataclass
class _Sequence:
    index: int
    state: SequenceState
    pending: Sequence[int]
    """Tokens to feed in the next step."""
    ids: list[int] = field(default_factory=list)


class Decoder:
    """Generates greedily with one model. Remembers the beginnings it is told to; one owner."""

    def __init__(self, model: Transformer, *, stop_id: int, batch: int = 48) -> None:
        """``batch``: sequences that advance together. ``stop_id`` ends an answer."""
        self._model = model.eval()
        self._stop_id = stop_id
        self._batch = batch
        self._device = model.embed.weight.device
        self._remembered: dict[tuple[int, ...], SequenceState] = {}

    def remember(self, ids: Sequence[int]) -> None:
        """Compute the state after ``ids`` now, for prompts that begin with them."""
        key = tuple(ids)
        if not key or key in self._remembered:
            return
        state, known = self._start(key)
        for at in range(known, len(key), _CHUNK_TOKENS):
            part = key[at : at + _CHUNK_TOKENS]
            self._model(self._tensor(part), [Segment(state, len(part))])
        self._remembered[key] = state

    def forget(self) -> None:
        """Drop all remembered states."""
        self._remembered.clear()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Generated]:
        """The most likely continuation, token by token, of each prompt, in order.

        ``max_tokens`` per answer; ``on_done`` is called as each one ends.
        """
        results: list[Generated | None] = [None] * len(prompts)
        # Prompts of similar work start together.
        waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        active: list[_Sequence] = []
        while waiting or active:
            self._admit(active, waiting, prompts)
            tokens = self._tensor([token for s in active for token in s.pending])
            segments = [Segment(s.state, len(s.pending)) for s in active]
            chosen = self._model(tokens, segments).argmax(-1).tolist()
            going: list[_Sequence] = []
            for sequence, token in zip(active, chosen, strict=True):
                stopped = token == self._stop_id
                if not stopped:
                    sequence.ids.append(token)
                    sequence.pending = (token,)
                if stopped or len(sequence.ids) >= max_tokens:
                    results[sequence.index] = Generated(ids=tuple(sequence.ids), stopped=stopped)
                    on_done()
                else:
                    going.append(sequence)
            active = going
        return [result for result in results if result is not None]

    def _admit(
        self, active: list[_Sequence], waiting: deque[int], prompts: Sequence[Sequence[int]]
    ) -> None:
        room = _CHUNK_TOKENS
        while waiting and len(active) < self._batch and room > 0:
            index = waiting.popleft()
            prompt = tuple(prompts[index])
            state, known = self._start(prompt[:-1])
            active.append(_Sequence(index, state, prompt[known:]))
            room -= len(prompt) - known

    def _start(self, ids: tuple[int, ...]) -> tuple[SequenceState, int]:
        """A state of its own after the longest remembered beginning of ``ids``, and its length."""
        known: tuple[int, ...] = ()
        for key in self._remembered:
            if len(known) < len(key) <= len(ids) and ids[: len(key)] == key:
                known = key
        if not known:
            return self._model.new_state(), 0
        return copy.deepcopy(self._remembered[known]), len(known)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)


def common_beginning(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest beginning all of ``sequences`` have."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)
