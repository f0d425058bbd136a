"""Attention of each query over its own list of entries, in one pass with a running softmax.

A program serves one query and a block of heads: all heads share keys, so a gathered tile of entries
is used by the whole block, first as keys and then as values.
"""

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

_MAX_HEADS = 32
_WIDEST = 512
_TILE_BYTES = 32 << 10
"""Of gathered entries at the official width: 32 in bfloat16, 16 in float32."""


@triton.jit
def _sparse_attention(
    q,
    kv,
    sink,
    index,
    out,
    heads,
    num_chosen,
    width,
    scale,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    place_HC = (t * heads + h)[:, None] * width + c[None, :]
    inside_HC = (h < heads)[:, None] & (c < width)[None, :]
    q_HC = tl.load(q + place_HC, mask=inside_HC, other=0.0)
    # The sink is an entry whose value is zero: the running softmax starts with it.
    top = tl.load(sink + h, mask=h < heads, other=0.0).to(tl.float32)
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    sum_HC = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for start in range(0, num_chosen, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = tl.load(index + t * num_chosen + k, mask=k < num_chosen, other=-1)
        real = row >= 0
        inside_KC = real[:, None] & (c < width)[None, :]
        kv_KC = tl.load(kv + row[:, None] * width + c[None, :], mask=inside_KC, other=0.0)
        logits_HK = tile_product(q_HC, tl.trans(kv_KC), WIDEN) * scale
        logits_HK = tl.where(real[None, :], logits_HK, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits_HK, axis=1))
        shrink = tl.exp(top - new_top)
        p_HK = tl.exp(logits_HK - new_top[:, None])
        total = total * shrink + tl.sum(p_HK, axis=1)
        used_HC = tile_product(p_HK.to(kv_KC.dtype), kv_KC, WIDEN)
        sum_HC = sum_HC * shrink[:, None] + used_HC
        top = new_top
    tl.store(out + place_HC, (sum_HC / total[:, None]).to(out.dtype.element_ty), mask=inside_HC)


def sparse_attention(
    q_THC: Tensor, kv_SC: Tensor, sink_H: Tensor, index_TK: Tensor, scale: float
) -> Tensor:
    """``reference.sparse_attention``.

    Probabilities are rounded to the dtype of ``kv_SC`` before they are normalised, not after; in
    float32 that makes no difference. Queries and entries of different dtypes are widened first,
    which copies; keep them the same.
    """
    num_queries, heads, width = q_THC.shape
    dtype = torch.promote_types(q_THC.dtype, kv_SC.dtype)
    q, kv = q_THC.to(dtype).contiguous(), kv_SC.to(dtype).contiguous()
    out = torch.empty(q.shape, dtype=q_THC.dtype, device=q.device)
    block_h = min(power_of_two(heads, MIN_DOT), _MAX_HEADS)
    with on_device_of(q):
        _sparse_attention[(num_queries, ceil_div(heads, block_h))](
            q,
            kv,
            sink_H,
            index_TK.contiguous(),
            out,
            heads,
            index_TK.shape[1],
            width,
            scale,
            BLOCK_H=block_h,
            BLOCK_K=_TILE_BYTES // (_WIDEST * dtype.itemsize),
            BLOCK_C=power_of_two(width, MIN_DOT),
            WIDEN=must_widen(q),
        )
    return out
