"""Packed batches on demand, made one step ahead in a thread, with a position to resume from."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rorqual.model.packed import ALIGNMENT
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.conversation import Encoded
from rorqual.train.data import Difficulty, SampleStream, StreamState
from rorqual.train.packing import Pack, num_blocks, pack

_POOL_FACTOR = 1.3
"""Samples drawn beyond a batch's capacity, so that first-fit has small ones to fill gaps."""


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """Where the batch maker stands after a batch: the stream and the samples drawn but unused."""

    stream: StreamState
    waiting: tuple[Encoded, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "next_index": self.stream.next_index,
            "tokens_by_task": list(self.stream.tokens_by_task),
            "waiting": [
                {
                    "task": s.task,
                    "tokens": s.tokens.tolist(),
                    "answer": s.answer.tolist(),
                    "kinds": list(s.kinds),
                }
                for s in self.waiting
            ],
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        return cls(
            stream=StreamState(
                next_index=raw["next_index"], tokens_by_task=tuple(raw["tokens_by_task"])
            ),
            waiting=tuple(
                Encoded(
                    task=s["task"],
                    tokens=np.asarray(s["tokens"], dtype=np.int32),
                    answer=np.asarray(s["answer"], dtype=np.int32),
                    kinds=tuple(s["kinds"]),
                )
                for s in raw["waiting"]
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's data and the state that continues after it."""

    pack: Pack
    state: BatchState


class BatchMaker:
    """Turns the sample stream into packed batches. Owned by one thread at a time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int,
        tokens_per_step: int,
        min_rows: int = 1,
        state: BatchState | None = None,
    ) -> None:
        """min_rows: take more than ``tokens_per_step`` where fewer rows than this would fit."""
        self._min_rows = min_rows
        self._tokens_per_step = tokens_per_step
        self._pad_id = tokenizer.pad_id
        self._stream = SampleStream(
            tokenizer, seed=seed, split="train", state=state.stream if state else None
        )
        self._waiting = list(state.waiting) if state else []

    def make(self, difficulty: Difficulty) -> Batch:
        """The next batch at ``difficulty``."""
        row_tokens = difficulty.max_sample_tokens
        num_rows = max(self._min_rows, self._tokens_per_step // row_tokens)
        # Shorter rows than before, as a resumed run may have, take none of the longer samples.
        self._waiting = [s for s in self._waiting if len(s) <= row_tokens]
        blocks = sum(num_blocks(s) for s in self._waiting)
        while blocks < _POOL_FACTOR * num_rows * (row_tokens // ALIGNMENT):
            sample = self._stream.draw(difficulty)
            blocks += num_blocks(sample)
            self._waiting.append(sample)
        packed, self._waiting = pack(
            self._waiting, num_rows=num_rows, row_tokens=row_tokens, pad_id=self._pad_id
        )
        state = BatchState(stream=self._stream.state, waiting=tuple(self._waiting))
        return Batch(pack=packed, state=state)


class Prefetcher:
    """Makes the next batch in a thread while a step runs. Use in ``with``.

    ``next(now, then)`` returns the batch asked for last time, which was made for the difficulty
    foretold then, so results do not depend on timing.
    """

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: Future[Batch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self, now: Difficulty, then: Difficulty) -> Batch:
        """The batch for ``now`` (for whatever was foretold, if anything was); prefetches ``then``.

        Raises whatever making the batch raised.
        """
        batch = self._pending.result() if self._pending else self._maker.make(now)
        self._pending = self._pool.submit(self._maker.make, then)
        return batch
