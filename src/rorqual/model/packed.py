"""Training rows: several samples side by side, attending only within themselves.

Every sample starts at a row offset that is a multiple of ``ALIGNMENT`` tokens, so a compression
group never holds tokens of two samples. Padding carries sample id -1 and belongs to no sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

ALIGNMENT = math.lcm(4, 128)


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens (T a multiple of ``ALIGNMENT``); [B, T], int64."""

    tokens_BT: Tensor
    targets_BT: Tensor
    """The token to predict at each place; -100 where no loss is taken."""
    sample_BT: Tensor
    """Sample number within the row, >= 0; -1 for padding."""
    position_BT: Tensor
    """Position within the sample, from 0."""
    weight_BT: Tensor | None = None
    """How much the loss at each target counts, float32; None for 1."""

    def to(self, device: str) -> PackedBatch:
        """The same batch on ``device``."""
        return PackedBatch(
            self.tokens_BT.to(device),
            self.targets_BT.to(device),
            self.sample_BT.to(device),
            self.position_BT.to(device),
            None if self.weight_BT is None else self.weight_BT.to(device),
        )


@dataclass(frozen=True)
class RouterStats:
    """How one score-routed layer spread a batch over its E experts."""

    load_E: Tensor
    """Share of all assignments given to each expert; sums to 1, no gradient."""
    prob_E: Tensor
    """Mean normalised affinity per expert, with gradient."""


@dataclass(frozen=True)
class PackedOutput:
    """What ``Transformer.forward_packed`` returns."""

    hidden_BTD: Tensor
    """Final normalised hidden state; ``Transformer.project`` turns it into logits."""
    mtp_hidden_BTD: Tensor | None
    """The same from the MTP block, predicting one token further."""
    router: list[RouterStats]
    """One per score-routed layer, in depth order, MTP last."""
    indexer_loss: Tensor | None
    """KL from the main attention to the indexer, mean over the layers with an indexer."""
