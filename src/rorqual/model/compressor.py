"""Turns runs of tokens into single entries: overlapping groups of 4 (CSA) or plain groups (HCA).

Report 2.3.1-2.3.2, eq. 9-13 and 20-23. A compressor projects every token to values and pooling
scores, pools each finished group with one softmax per channel, normalises, rotates by the position
of the group's first token, and (official numerics) rounds to the stored precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, reference
from rorqual.model.config import ModelConfig, is_overlapping
from rorqual.model.linear import Linear
from rorqual.model.norm import RMSNorm
from rorqual.model.packed import PackedBatch
from rorqual.model.rope import RotaryTable
from rorqual.model.state import CompressorState


class Compressor(nn.Module):
    """Compresses normalised layer inputs into [entries, width] rows."""

    def __init__(self, config: ModelConfig, ratio: int, width: int, *, rotated: bool) -> None:
        """rotated: apply the Hadamard transform and FP4 (indexer keys) instead of FP8 (values)."""
        super().__init__()
        self.ratio = ratio
        self.width = width
        self.overlapping = is_overlapping(ratio)
        self.rotated = rotated
        self.official = config.numerics == "official"
        self.rope_dim = config.qk_rope_head_dim
        columns = width * (2 if self.overlapping else 1)
        self.wkv = Linear(config.hidden_size, columns)
        self.wgate = Linear(config.hidden_size, columns)
        self.ape = nn.Parameter(torch.zeros(ratio, columns))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Values and pooling scores per token, float32; x [..., D], positions [...]."""
        x = reference.wide(x)
        return self.wkv(x), self.wgate(x) + self.ape[positions % self.ratio]

    def extend(
        self,
        values_TX: Tensor,
        scores_TX: Tensor,
        state: CompressorState,
        rope: RotaryTable,
        dtype: torch.dtype,
    ) -> None:
        """Feed the next tokens of one sequence; appends every group they finish to ``state``."""
        if state.tail_values is not None and state.tail_scores is not None:
            values_TX = torch.cat((state.tail_values, values_TX))
            scores_TX = torch.cat((state.tail_scores, scores_TX))
        groups = values_TX.shape[0] // self.ratio
        done = groups * self.ratio
        # Cloned: a view would keep the whole chunk alive.
        state.tail_values, state.tail_scores = values_TX[done:].clone(), scores_TX[done:].clone()
        if groups == 0:
            return
        values = values_TX[:done].unflatten(0, (groups, self.ratio))
        scores = scores_TX[:done].unflatten(0, (groups, self.ratio))
        if self.overlapping:
            half = self.width
            before_v, before_s = state.previous_values, state.previous_scores
            if before_v is None or before_s is None:
                before_v = values.new_zeros(self.ratio, half)
                before_s = scores.new_full((self.ratio, half), -torch.inf)
            state.previous_values = values[-1, :, :half].clone()
            state.previous_scores = scores[-1, :, :half].clone()
            values = _with_previous(values, torch.cat((before_v[None], values[:-1, :, :half])))
            scores = _with_previous(scores, torch.cat((before_s[None], scores[:-1, :, :half])))
        first = len(state.entries)
        starts = torch.arange(first, first + groups, device=values.device) * self.ratio
        pooled = dispatch.kernels_for(values).pool_group(values, scores)
        state.entries.append(self._finish(pooled, starts, rope, dtype))

    def forward_packed(self, x_BTD: Tensor, batch: PackedBatch, rope: RotaryTable) -> Tensor:
        """Every entry of packed training rows, [B, T / ratio, width]; groups never straddle.

        Entries of unfinished groups are garbage that no query may see.
        """
        values, scores = self.project(x_BTD, batch.position_BT)
        values = values.unflatten(1, (-1, self.ratio))
        scores = scores.unflatten(1, (-1, self.ratio))
        starts = batch.position_BT[:, :: self.ratio]
        if self.overlapping:
            half = self.width
            first = (starts == 0)[..., None, None]
            prev_v = nn.functional.pad(values[:, :-1, :, :half], (0, 0, 0, 0, 1, 0))
            prev_s = nn.functional.pad(scores[:, :-1, :, :half], (0, 0, 0, 0, 1, 0))
            values = _with_previous(values, prev_v)
            scores = _with_previous(scores, prev_s.masked_fill(first, -torch.inf))
        return self._finish(reference.pool_group(values, scores), starts, rope, x_BTD.dtype)

    def _finish(
        self, pooled: Tensor, starts: Tensor, rope: RotaryTable, dtype: torch.dtype
    ) -> Tensor:
        entries = reference.rotate(self.norm(pooled).to(dtype), *rope(starts))
        if not self.official:
            return entries
        if self.rotated:
            return reference.round_index(entries)
        return reference.round_entry(entries, self.rope_dim)


def _with_previous(current: Tensor, previous: Tensor) -> Tensor:
    """Slots of an overlapping group: the previous group's first half, then the own second half."""
    return torch.cat((previous, current[..., previous.shape[-1] :]), dim=-2)
