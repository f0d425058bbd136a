"""A running request inside the engine: its state, and how many of its tokens the model has seen."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.engine.handle import Handle
from rorqual.engine.request import Usage
from rorqual.engine.sampler import SamplerRow
from rorqual.engine.scheduler import SequenceView
from rorqual.model.state import SequenceState


class RunningSequence:
    """One running request. Owned by the engine's thread."""

    def __init__(self, key: int, handle: Handle, state: SequenceState) -> None:
        """Continue ``handle``'s prompt from ``state``, which has read ``state.length`` of it."""
        self.key = key
        self.handle = handle
        self.state = state
        self.prompt_ids = handle.request.prompt_ids
        self.output_ids: list[int] = []
        self.num_cached = state.length
        self.num_fed = state.length
        self.last_step = -1
        self.num_restarts = 0
        self.is_suspect = False
        """Was in a failed step, and has not drawn a token since."""
        self.row = SamplerRow(params=handle.request.sampling, prompt_ids=self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens the model has not seen."""
        return self.num_tokens - self.num_fed

    def restart(self, state: SequenceState) -> None:
        """Read everything again, prompt and answer so far, into a new ``state``."""
        self.state = state
        self.num_fed = state.length
        self.num_restarts += 1
        self.is_suspect = True

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
