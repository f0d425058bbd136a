"""Manifold-constrained hyper-connections: logits, Sinkhorn, and the reads and writes of streams.

Logits and coefficients are two kernels: the first is a product over the flattened streams, the
second works on one 4 x 4 matrix per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.reference import StreamMixing
from rorqual.kernels.triton.launch import MIN_DOT, ceil_div, on_device_of, power_of_two

_TOKENS = 16
_DEPTH = 64
_COLUMNS = 256


@triton.jit
def _project_streams(
    streams,
    fn,
    out,
    num_tokens,
    width,
    rows,
    norm_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.arange(0, BLOCK_O)
    logits_NO = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    square_N = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside_NI = (n < num_tokens)[:, None] & (i < width)[None, :]
        x_NI = tl.load(streams + n[:, None] * width + i[None, :], mask=inside_NI, other=0.0)
        x_NI = x_NI.to(tl.float32)
        inside_OI = (o < rows)[:, None] & (i < width)[None, :]
        fn_OI = tl.load(fn + o[:, None] * width + i[None, :], mask=inside_OI, other=0.0)
        fn_OI = fn_OI.to(tl.float32)
        logits_NO += tl.dot(x_NI, tl.trans(fn_OI), input_precision="ieee")
        square_N += tl.sum(x_NI * x_NI, axis=1)
    logits_NO = logits_NO * tl.rsqrt(square_N / width + norm_eps)[:, None]
    inside_NO = (n < num_tokens)[:, None] & (o < rows)[None, :]
    tl.store(out + n[:, None] * rows + o[None, :], logits_NO, mask=inside_NO)


@triton.jit
def _coefficients(
    logits,
    scale,
    base,
    pre,
    post,
    comb,
    num_tokens,
    m,
    iterations,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_M)
    rows = 2 * m + m * m
    inside_N = n < num_tokens
    inside_NM = inside_N[:, None] & (j < m)[None, :]
    to_pre = tl.load(logits + n[:, None] * rows + j[None, :], mask=inside_NM, other=0.0)
    to_pre = to_pre * tl.load(scale) + tl.load(base + j, mask=j < m, other=0.0)[None, :]
    tl.store(pre + n[:, None] * m + j[None, :], tl.sigmoid(to_pre) + eps, mask=inside_NM)
    to_post = tl.load(logits + n[:, None] * rows + m + j[None, :], mask=inside_NM, other=0.0)
    to_post = to_post * tl.load(scale + 1) + tl.load(base + m + j, mask=j < m, other=0.0)[None, :]
    tl.store(post + n[:, None] * m + j[None, :], 2.0 * tl.sigmoid(to_post), mask=inside_NM)

    cell = j[:, None] * m + j[None, :]
    square = (j < m)[:, None] & (j < m)[None, :]
    inside_NMM = inside_N[:, None, None] & square[None, :, :]
    place = n[:, None, None] * rows + 2 * m + cell[None, :, :]
    a = tl.load(logits + place, mask=inside_NMM, other=0.0) * tl.load(scale + 2)
    a += tl.load(base + 2 * m + cell, mask=square, other=0.0)[None, :, :]
    # Padding columns weigh nothing in the softmax; padding rows and columns stay zero after it.
    a = tl.where((j < m)[None, None, :], a, float("-inf"))
    a = tl.exp(a - tl.max(a, axis=2)[:, :, None])
    a = a / tl.sum(a, axis=2)[:, :, None] + eps
    a = tl.where(square[None, :, :], a, 0.0)
    a = a / (tl.sum(a, axis=1)[:, None, :] + eps)
    for _ in range(iterations - 1):
        a = a / (tl.sum(a, axis=2)[:, :, None] + eps)
        a = a / (tl.sum(a, axis=1)[:, None, :] + eps)
    tl.store(comb + n[:, None, None] * m * m + cell[None, :, :], a, mask=inside_NMM)


@triton.jit
def _read_streams(streams, pre, out, m, width, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_M)
    inside_MD = (j < m)[:, None] & (d < width)[None, :]
    x_MD = tl.load(streams + (n * m + j)[:, None] * width + d[None, :], mask=inside_MD, other=0.0)
    pre_M = tl.load(pre + n * m + j, mask=j < m, other=0.0).to(tl.float32)
    u_D = tl.sum(x_MD.to(tl.float32) * pre_M[:, None], axis=0)
    tl.store(out + n * width + d, u_D.to(out.dtype.element_ty), mask=d < width)


@triton.jit
def _write_streams(
    output,
    streams,
    post,
    comb,
    out,
    m,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_M)
    f_D = tl.load(output + n * width + d, mask=d < width, other=0.0).to(tl.float32)
    post_M = tl.load(post + n * m + k, mask=k < m, other=0.0).to(tl.float32)
    new_MD = post_M[:, None] * f_D[None, :]
    for j in range(m):
        x_D = tl.load(streams + (n * m + j) * width + d, mask=d < width, other=0.0)
        comb_M = tl.load(comb + (n * m + j) * m + k, mask=k < m, other=0.0).to(tl.float32)
        new_MD += comb_M[:, None] * x_D.to(tl.float32)[None, :]
    inside_MD = (k < m)[:, None] & (d < width)[None, :]
    place_MD = (n * m + k)[:, None] * width + d[None, :]
    tl.store(out + place_MD, new_MD.to(out.dtype.element_ty), mask=inside_MD)


def stream_mixing(
    streams_NMD: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> StreamMixing:
    """``reference.stream_mixing``."""
    num_tokens, m, _ = streams_NMD.shape
    rows, width = fn.shape
    new = streams_NMD.new_empty
    logits = new(num_tokens, rows, dtype=torch.float32)
    pre, post = new(num_tokens, m, dtype=torch.float32), new(num_tokens, m, dtype=torch.float32)
    comb = new(num_tokens, m, m, dtype=torch.float32)
    grid = (ceil_div(num_tokens, _TOKENS),)
    with on_device_of(streams_NMD):
        _project_streams[grid](
            streams_NMD.contiguous(),
            fn.contiguous(),
            logits,
            num_tokens,
            width,
            rows,
            norm_eps,
            BLOCK_N=_TOKENS,
            BLOCK_I=_DEPTH,
            BLOCK_O=power_of_two(rows, MIN_DOT),
        )
        _coefficients[grid](
            logits,
            scale,
            base,
            pre,
            post,
            comb,
            num_tokens,
            m,
            iterations,
            eps,
            BLOCK_N=_TOKENS,
            BLOCK_M=power_of_two(m),
        )
    return StreamMixing(pre, post, comb)


def read_streams(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    """``reference.read_streams``."""
    num_tokens, m, width = streams_NMD.shape
    out = streams_NMD.new_empty(num_tokens, width)
    with on_device_of(out):
        _read_streams[(num_tokens, ceil_div(width, _COLUMNS))](
            streams_NMD.contiguous(),
            pre_NM.contiguous(),
            out,
            m,
            width,
            BLOCK_M=power_of_two(m),
            BLOCK_D=_COLUMNS,
        )
    return out


def write_streams(output_ND: Tensor, streams_NMD: Tensor, mixing: StreamMixing) -> Tensor:
    """``reference.write_streams``."""
    num_tokens, m, width = streams_NMD.shape
    out = torch.empty_like(streams_NMD, memory_format=torch.contiguous_format)
    with on_device_of(out):
        _write_streams[(num_tokens, ceil_div(width, _COLUMNS))](
            output_ND.contiguous(),
            streams_NMD.contiguous(),
            mixing.post_NM.contiguous(),
            mixing.comb_NMM.contiguous(),
            out,
            m,
            width,
            BLOCK_M=power_of_two(m),
            BLOCK_D=_COLUMNS,
        )
    return out
