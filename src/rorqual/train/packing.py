"""Places samples side by side in rows of a fixed length with little padding.

Every sample starts at a multiple of ``ALIGNMENT`` tokens (see ``model.packed``), so each occupies
whole blocks; rows are filled first-fit decreasing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rorqual.model.packed import ALIGNMENT, PackedBatch
from rorqual.train.conversation import TASKS, Encoded

NO_TARGET = -100
_FIRST_TURN_WEIGHT = 3.0
"""Of the first answer about a document: it has no other answer to follow, and is one of many."""
_ABSENT_WEIGHT = 4.0
"""Of saying that something is not stated: a few tokens, of which the first decides."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One sample's place: ``row`` and token ``offset`` in the batch."""

    row: int
    offset: int
    sample: Encoded


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A batch with the samples it was made of."""

    batch: PackedBatch
    placed: tuple[Placed, ...]
    task_BT: torch.Tensor
    """Index into ``TASKS`` of each place's sample, int64; 0 for padding."""

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to samples."""
        return sum(len(p.sample) for p in self.placed)

    @property
    def padding_fraction(self) -> float:
        """Share of the batch's places that belong to no sample."""
        return 1.0 - self.num_tokens / self.batch.tokens_BT.numel()


def num_blocks(sample: Encoded) -> int:
    """Alignment blocks a sample occupies."""
    return -(-len(sample) // ALIGNMENT)


def first_fit(sizes: Sequence[int], num_rows: int, capacity: int) -> list[tuple[int, int] | None]:
    """(row, start) for each item, largest items first; None where no row has room.

    Sizes, capacity and starts are in the same unit. Ties keep their order.
    """
    free = [capacity] * num_rows
    places: list[tuple[int, int] | None] = [None] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for row in range(num_rows):
            if sizes[item] <= free[row]:
                places[item] = (row, capacity - free[row])
                free[row] -= sizes[item]
                break
    return places


def target_weights(sample: Encoded) -> NDArray[np.float32]:
    """How much the loss counts at each of ``sample``'s tokens, [T]."""
    of_turn = [
        (_FIRST_TURN_WEIGHT if turn == 0 and kind in ("evidence", "absent") else 1.0)
        * (_ABSENT_WEIGHT if kind == "absent" else 1.0)
        for turn, kind in enumerate(sample.kinds)
    ]
    return np.array([*of_turn, 1.0], dtype=np.float32)[sample.answer]  # -1, no answer: the last


def pack(
    samples: Sequence[Encoded], *, num_rows: int, row_tokens: int, pad_id: int
) -> tuple[Pack, list[Encoded]]:
    """Pack as many ``samples`` as fit into [num_rows, row_tokens]; returns the rest in order.

    ``row_tokens`` is a multiple of ``ALIGNMENT``. Targets are the next token wherever that must
    be generated, ``NO_TARGET`` elsewhere.
    """
    assert row_tokens % ALIGNMENT == 0, row_tokens
    places = first_fit([num_blocks(s) for s in samples], num_rows, row_tokens // ALIGNMENT)
    shape = (num_rows, row_tokens)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, NO_TARGET, dtype=np.int64)
    owner = np.full(shape, -1, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    task = np.zeros(shape, dtype=np.int64)
    weight = np.ones(shape, dtype=np.float32)
    num_in_row = [0] * num_rows
    placed: list[Placed] = []
    rest: list[Encoded] = []
    for sample, place in zip(samples, places, strict=True):
        if place is None:
            rest.append(sample)
            continue
        row, start = place[0], place[1] * ALIGNMENT
        at = slice(start, start + len(sample))
        tokens[row, at] = sample.tokens
        targets[row, start : start + len(sample) - 1] = np.where(
            sample.answer[1:] >= 0, sample.tokens[1:], NO_TARGET
        )
        owner[row, at] = num_in_row[row]
        position[row, at] = np.arange(len(sample))
        task[row, at] = TASKS.index(sample.task)
        weight[row, start : start + len(sample) - 1] = target_weights(sample)[1:]
        num_in_row[row] += 1
        placed.append(Placed(row=row, offset=start, sample=sample))
    batch = PackedBatch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        sample_BT=torch.from_numpy(owner),
        position_BT=torch.from_numpy(position),
        weight_BT=torch.from_numpy(weight),
    )
    return Pack(batch=batch, placed=tuple(placed), task_BT=torch.from_numpy(task)), rest
