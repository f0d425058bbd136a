"""Lightning indexer scores, a block of entries per program; no [T, H, S] intermediate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.triton.launch import (
    MIN_DOT,
    ceil_div,
    must_widen,
    on_device_of,
    power_of_two,
    tile_product,
)

_ENTRIES = 64


@triton.jit
def _indexer_scores(
    q,
    weight,
    key,
    out,
    heads,
    num_entries,
    width,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    h = tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    inside_HC = (h < heads)[:, None] & (c < width)[None, :]
    q_HC = tl.load(q + (t * heads + h)[:, None] * width + c[None, :], mask=inside_HC, other=0.0)
    inside_SC = (s < num_entries)[:, None] & (c < width)[None, :]
    key_SC = tl.load(key + s[:, None] * width + c[None, :], mask=inside_SC, other=0.0)
    w_H = tl.load(weight + t * heads + h, mask=h < heads, other=0.0).to(tl.float32)
    dots_HS = tl.maximum(tile_product(q_HC, tl.trans(key_SC), WIDEN), 0.0)
    score_S = tl.sum(dots_HS * w_H[:, None], axis=0)
    tl.store(out + t * num_entries + s, score_S, mask=s < num_entries)


def indexer_scores(q_THC: Tensor, weight_TH: Tensor, key_SC: Tensor) -> Tensor:
    """``reference.indexer_scores``; queries and keys of different dtypes are widened first."""
    num_queries, heads, width = q_THC.shape
    num_entries = key_SC.shape[0]
    dtype = torch.promote_types(q_THC.dtype, key_SC.dtype)
    q, key = q_THC.to(dtype).contiguous(), key_SC.to(dtype).contiguous()
    out = torch.empty(num_queries, num_entries, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _indexer_scores[(num_queries, ceil_div(num_entries, _ENTRIES))](
            q,
            weight_TH.contiguous(),
            key,
            out,
            heads,
            num_entries,
            width,
            BLOCK_H=power_of_two(heads, MIN_DOT),
            BLOCK_S=_ENTRIES,
            BLOCK_C=power_of_two(width, MIN_DOT),
            WIDEN=must_widen(q),
        )
    return out
