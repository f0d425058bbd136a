"""A running request inside the engine: its memory, and how many of its tokens that has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rorqual.engine.backend import Memory
from rorqual.engine.grammar import Constraint
from rorqual.engine.handle import Handle
from rorqual.engine.request import Usage
from rorqual.engine.sampler import SamplerRow
from rorqual.engine.scheduler import SequenceView

_TRUST = 0.5
"""Share of right guesses below which drafting stops: a wrong one costs about half a step."""
_TRUST_MEMORY = 0.9
_SECOND_CHANCE_TOKENS = 64
"""A sequence that lost trust drafts again this often: answers change between prose and quotes."""


class RunningSequence:
    """One running request. Owned by the engine's thread."""

    def __init__(self, key: int, handle: Handle) -> None:
        """Nothing read yet, no memory. Raises EngineError if the constraint cannot be started."""
        self.key = key
        self.handle = handle
        self.memory: Memory | None = None
        """None while it waits for memory."""
        self.prompt_ids = handle.request.prompt_ids
        self.output_ids: list[int] = []
        self.draft_ids: list[int] = []
        """Guesses at the tokens after the last one."""
        self.num_cached = 0
        self.last_step = -1
        self.num_restarts = 0
        self.is_suspect = False
        """Was in a failed step, and has not drawn a token since."""
        self.row = SamplerRow(params=handle.request.sampling, prompt_ids=self.prompt_ids)
        self.constraint = self._started_constraint()
        self._trust = 1.0

    @property
    def held(self) -> Memory:
        """The memory of a sequence that has some."""
        assert self.memory is not None, "preempted"
        return self.memory

    @property
    def num_fed(self) -> int:
        """Tokens the network has seen."""
        return self.held.length

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens the network has not seen."""
        return self.num_tokens - self.num_fed

    @property
    def all_tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return [*self.prompt_ids, *self.output_ids]

    def restart(self, memory: Memory) -> None:
        """Read everything again, prompt and answer so far, into ``memory``.

        Raises EngineError if the constraint does not take the answer a second time.
        """
        self.memory = memory
        self.constraint = self._started_constraint()
        self.num_restarts += 1
        self.is_suspect = True

    def judge(self, was_right: bool) -> None:
        """Remember how a guess turned out."""
        self._trust = _TRUST_MEMORY * self._trust + (1 - _TRUST_MEMORY) * was_right

    def trusts_drafts(self) -> bool:
        """Whether guessing pays, from how the last guesses turned out."""
        return self._trust >= _TRUST or len(self.output_ids) % _SECOND_CHANCE_TOKENS == 0

    def follow(self, token: int) -> Literal["stop", "length"] | None:
        """Append a drawn token to the answer; why the answer ends here, if its constraint says so.

        Raises EngineError, with the token appended to nothing.
        """
        if self.constraint is not None:
            self.constraint.accept(token)
        self.row.record(token)
        self.output_ids.append(token)
        return None if self.constraint is None else self.constraint.finish_reason

    def _started_constraint(self) -> Constraint | None:
        """The request's constraint after the answer so far."""
        source = self.handle.request.constraint
        if source is None:
            return None
        constraint = source.start()
        for token in self.output_ids:
            constraint.accept(token)
        return constraint

    def next_tokens(self, count: int) -> Sequence[int]:
        """The next ``count`` tokens to feed."""
        begin, end, prompt = self.num_fed, self.num_fed + count, len(self.prompt_ids)
        if end <= prompt:
            return self.prompt_ids[begin:end]
        answered = self.output_ids[max(begin - prompt, 0) : end - prompt]
        return [*self.prompt_ids[begin:], *answered]

    def view(self) -> SequenceView:
        """What the scheduler may know."""
        return SequenceView(
            key=self.key,
            pending_tokens=self.num_pending,
            is_decoding=self.num_pending == 1 and self.num_fed >= len(self.prompt_ids),
            last_step=self.last_step,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.num_cached,
            completion_tokens=len(self.output_ids),
        )
