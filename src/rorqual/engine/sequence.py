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
        self.row = SamplerRow(params=handle.request.sampling, prompt_ids=self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens the model has not seen."""
        return self.num_tokens - self.num_fed

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt has been fed."""
        return self.num_fed >= len(self.prompt_ids)

    def next_tokens(self, count: int) -> Sequence[int]:
        """The next ``count`` tokens to feed; never straddles prompt and answer."""
        if self.is_decoding:
            at = self.num_fed - len(self.prompt_ids)
            return self.output_ids[at : at + count]
        return self.prompt_ids[self.num_fed : self.num_fed + count]

    def view(self) -> SequenceView:
        """What the scheduler may know."""
        return SequenceView(
            key=self.key,
            pending_tokens=self.num_pending,
            is_decoding=self.is_decoding,
            last_step=self.last_step,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.num_cached,
            completion_tokens=len(self.output_ids),
        )
