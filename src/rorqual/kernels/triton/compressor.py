"""Pooling of compression groups: one softmax per channel over the slots of a group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.triton.launch import ceil_div, on_device_of, power_of_two

_CHANNELS = 64


@triton.jit
def _pool_group(values, scores, out, slots, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    g = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    place_PC = (g * slots + p)[:, None] * width + c[None, :]
    inside_PC = (p < slots)[:, None] & (c < width)[None, :]
    score_PC = tl.load(scores + place_PC, mask=inside_PC, other=float("-inf")).to(tl.float32)
    value_PC = tl.load(values + place_PC, mask=inside_PC, other=0.0).to(tl.float32)
    # Channels beyond the width have no score; a zero keeps them finite.
    top_C = tl.where(c < width, tl.max(score_PC, axis=0), 0.0)
    weight_PC = tl.exp(score_PC - top_C[None, :])
    total_C = tl.where(c < width, tl.sum(weight_PC, axis=0), 1.0)
    pooled_C = tl.sum(weight_PC * value_PC, axis=0) / total_C
    tl.store(out + g * width + c, pooled_C, mask=c < width)


def pool_group(values_GPC: Tensor, scores_GPC: Tensor) -> Tensor:
    """``reference.pool_group``, float32. Every channel needs a score above -inf in each group."""
    groups, slots, width = values_GPC.shape
    out = torch.empty(groups, width, dtype=torch.float32, device=values_GPC.device)
    with on_device_of(out):
        _pool_group[(groups, ceil_div(width, _CHANNELS))](
            values_GPC.contiguous(),
            scores_GPC.contiguous(),
            out,
            slots,
            width,
            BLOCK_P=power_of_two(slots),
            BLOCK_C=_CHANNELS,
        )
    return out
