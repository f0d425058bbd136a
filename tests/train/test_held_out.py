"""The cheap check during training counts answers whose every token comes first."""

from __future__ import annotations

import numpy as np
import torch

from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.conversation import Encoded
from rorqual.train.held_out import HeldOutSet, answer_hits

from .conftest import SMALL, small_model


def test_hits_are_counted_per_answer_at_the_place_that_predicts() -> None:
    sample = Encoded(
        task="tool",
        tokens=np.arange(8, dtype=np.int32),
        answer=np.array([-1, -1, 0, 0, -1, 1, 1, 1], dtype=np.int32),
        kinds=("call", "result"),
    )
    right = torch.tensor([False, True, True, False, True, False, True, True])
    assert answer_hits(sample, right) == [("call", 2, 2), ("result", 2, 3)]


def test_every_length_and_answer_kind_is_reported(tokenizer: Tokenizer) -> None:
    held_out = HeldOutSet(tokenizer, samples_per_slice=2)
    model = small_model(SMALL)
    rows = {row.slice: row for row in held_out.evaluate(model, "cpu", bf16=False)}
    assert list(rows) == [
        "evidence<=512", "evidence<=1024", "evidence<=2048", "evidence<=4096",
        "tool call", "tool result",
    ]  # fmt: skip
    for row in rows.values():
        assert row.num_answers >= 2
        assert row.exact == 0.0
        assert row.token_accuracy < 0.05
