"""The truth: every numerical operation of the V4 network in plain PyTorch.

Slow and obvious on purpose. A faster kernel keeps the signature and is tested against the function
here. Nothing in this file holds state or knows a module. Source: technical report of DeepSeek-V4
(arXiv 2606.19348), sections 2.1-2.4; numerics as in the official inference code.

Shape suffixes
    N tokens (any mix of sequences) · T query tokens of one sequence · S stored entries
    D hidden · M residual streams · H heads · C head width · R rotated dims · K selected entries
    E experts · G groups · P slots pooled into one compressed entry
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def wide(x: Tensor) -> Tensor:
    """``x`` in the accumulation type: float32, or float64 where the caller already uses it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ---- normalisation and rotation -----------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last axis, times ``weight`` if given; computed wide, returned as x.dtype.

    The cast comes after the product with the weight, as in the official code.
    """
    y = wide(x)
    if weight is not None:
        weight = weight.to(y.dtype)
    return torch.nn.functional.rms_norm(y, (y.shape[-1],), weight, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last ``2 * cos.shape[-1]`` dims of ``x`` as interleaved complex pairs.

    Args:
        x: [..., C], rotated dims last; the others pass through.
        cos, sin: [..., R/2], broadcast against the leading axes of ``x``.
        inverse: multiply by the conjugate, which turns absolute into relative positions on outputs.
    """
    half = cos.shape[-1]
    keep, turn = x[..., : -2 * half], wide(x[..., -2 * half :])
    if inverse:
        sin = -sin
    even, odd = turn[..., 0::2], turn[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((keep, turned.to(x.dtype)), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Sylvester-Walsh transform of the last axis (a power of two), orthonormal; keeps the dtype."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"hadamard needs a power-of-two width, got {width}")
    y = wide(x)
    step = 1
    while step < width:
        y = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        low, high = y[..., 0, :], y[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        step *= 2
    out: Tensor = (y * width**-0.5).to(x.dtype)
    return out


# ---- quantised numerics -------------------------------------------------------------------------


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., K] -> [..., ceil(K/block), block], zero padded; a short last block has its scale."""
    pad = -x.shape[-1] % block
    if pad:
        x = torch.nn.functional.pad(x, (0, pad))
    return x.reshape(*x.shape[:-1], -1, block)


def round_to_power_of_two(x: Tensor) -> Tensor:
    """2 ** ceil(log2 x), exactly, for positive finite float32 ``x``."""
    mantissa, exponent = torch.frexp(x)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(x), exponent)


def round_fp4(x: Tensor) -> Tensor:
    """Nearest e2m1 value of ``x`` in [-6, 6], ties to the even code."""
    edges = torch.tensor(_FP4_MIDPOINTS, dtype=x.dtype, device=x.device)
    magnitude = x.abs().contiguous()
    code = torch.bucketize(magnitude, edges)  # a tie lands on the lower code
    tie = magnitude == edges[code.clamp(max=6)]
    code = code + (tie & (code % 2 == 1)).to(code.dtype)
    values = torch.tensor(FP4_VALUES, dtype=x.dtype, device=x.device)
    return torch.copysign(values[code], x)


def simulate_fp8(x: Tensor, block: int) -> Tensor:
    """Round ``x`` to e4m3 with one power-of-two scale per ``block`` of the last axis, and back."""
    y = _blocks(x.float(), block)
    amax = y.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = round_to_power_of_two(amax / FP8_MAX)
    q = (y / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return q.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def simulate_fp4(x: Tensor, block: int) -> Tensor:
    """Round ``x`` to e2m1 with one power-of-two scale per ``block`` of the last axis, and back."""
    y = _blocks(x.float(), block)
    amax = y.abs().amax(-1, keepdim=True).clamp_min(FP4_MAX * 2.0**-126)
    scale = round_to_power_of_two(amax / FP4_MAX)
    q = round_fp4((y / scale).clamp(-FP4_MAX, FP4_MAX)) * scale
    return q.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_entry(x: Tensor, rope_dim: int) -> Tensor:
    """A key/value entry [..., C] as the official record keeps it: FP8 except the rotated dims."""
    keep = x.shape[-1] - rope_dim
    return torch.cat((simulate_fp8(x[..., :keep], 64), x[..., keep:]), dim=-1)


def round_index(x: Tensor) -> Tensor:
    """An indexer query or key [..., C] in the official precision: Hadamard, then FP4."""
    return simulate_fp4(hadamard(x), 32)


def dequantize_fp8(weight_OI: Tensor, scale: Tensor, *, block: int = 128) -> Tensor:
    """float32 value of an e4m3 matrix [out, in] with one e8m0 scale per block x block tile."""
    out, width = weight_OI.shape
    rows = scale.float().repeat_interleave(block, 0)[:out]
    return weight_OI.float() * rows.repeat_interleave(block, 1)[:, :width]


def dequantize_fp4(packed_OI: Tensor, scale: Tensor, *, block: int = 32) -> Tensor:
    """float32 [out, in] of packed e2m1 [out, in/2], low nibble first, one e8m0 scale per 32 inputs.

    Bit 3 of a code is the sign.
    """
    table = torch.tensor(
        FP4_VALUES + tuple(-v for v in FP4_VALUES), dtype=torch.float32, device=packed_OI.device
    )
    codes = packed_OI.view(torch.uint8).int()
    values = torch.stack((table[codes & 15], table[codes >> 4]), dim=-1).flatten(-2)
    return values * scale.float().repeat_interleave(block, 1)[:, : values.shape[1]]


# ---- manifold-constrained hyper-connections (report 2.2, eq. 3-8) -------------------------------


class StreamMixing(NamedTuple):
    """How one sub-layer reads and writes the M residual streams of N tokens (float32)."""

    pre_NM: Tensor
    post_NM: Tensor
    comb_NMM: Tensor


def sinkhorn(logits_NMM: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic matrices: softmax rows, then alternate column and row normalisation.

    ``iterations`` column normalisations in all; the last operation is on columns, as in the
    official code (the report prints the other order).
    """
    small = logits_NMM.new_full((), eps)  # once: a Python number is wrapped anew by every add
    a = logits_NMM.softmax(-1) + small
    a = a / (a.sum(-2, keepdim=True) + small)
    for _ in range(iterations - 1):
        a = a / (a.sum(-1, keepdim=True) + small)
        a = a / (a.sum(-2, keepdim=True) + small)
    return a


def stream_projection(streams_NMD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The mixing logits before scale and bias: flat(X) fn^T / rms(flat X); [N, rows of fn]."""
    flat = wide(streams_NMD).flatten(-2)
    with torch.autocast(flat.device.type, enabled=False):
        logits = flat @ wide(fn).T
    return logits * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


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
    """Dynamic read (sigmoid), write (2 sigmoid) and residual (Sinkhorn) coefficients.

    Args:
        fn: [2M + M*M, M*D]; scale: [3]; base: [2M + M*M].
    """
    m = streams_NMD.shape[-2]
    logits = stream_projection(streams_NMD, fn, norm_eps)
    pre = torch.sigmoid(logits[..., :m] * scale[0] + base[:m]) + eps
    post = 2.0 * torch.sigmoid(logits[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (logits[..., 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
    return StreamMixing(pre, post, sinkhorn(comb, iterations, eps))


def read_streams(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    """u = sum_j pre_j X_j, in the dtype of the streams."""
    return (pre_NM.unsqueeze(-2) @ wide(streams_NMD)).squeeze(-2).to(streams_NMD.dtype)


def write_streams(output_ND: Tensor, streams_NMD: Tensor, mixing: StreamMixing) -> Tensor:
    """X'_k = post_k f + sum_j comb[j, k] X_j (the sum runs over the first index)."""
    residual = mixing.comb_NMM.transpose(-1, -2) @ wide(streams_NMD)
    new = mixing.post_NM.unsqueeze(-1) * wide(output_ND).unsqueeze(-2) + residual
    return new.to(streams_NMD.dtype)


def merge_streams(
    streams_NMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """The head's read of the streams: y = sum_j (sigmoid(m_j scale + base_j) + eps) X_j."""
    pre = torch.sigmoid(stream_projection(streams_NMD, fn, norm_eps) * scale + base) + eps
    return read_streams(streams_NMD, pre)


# ---- compression, selection, attention (report 2.3, eq. 9-27) -----------------------------------


def pool_group(values_GPC: Tensor, scores_GPC: Tensor) -> Tensor:
    """One entry per group: softmax over the P slots, independently per channel; [G, C]."""
    return (scores_GPC.softmax(dim=-2) * values_GPC).sum(-2)


def indexer_scores(q_THC: Tensor, weight_TH: Tensor, key_SC: Tensor) -> Tensor:
    """Lightning indexer: score[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]); float32 [T, S]."""
    dots = torch.einsum("thc,sc->ths", wide(q_THC), wide(key_SC)).relu()
    return (dots * wide(weight_TH).unsqueeze(-1)).sum(-2)


def visible_entries(num_entries: int, visible_T: Tensor) -> Tensor:
    """Every visible entry of each query: int64 [T, num_entries], -1 from ``visible_T[t]`` on."""
    every = torch.arange(num_entries, device=visible_T.device)
    return torch.where(every < visible_T.unsqueeze(-1), every, -1)


def select_entries(scores_TS: Tensor, visible_T: Tensor, topk: int) -> Tensor:
    """Indices of the best ``topk`` of the first ``visible_T[t]`` entries; -1 where fewer exist.

    Ranked by the float32 score; among equals the earlier entry wins, so that the choice does not
    depend on how many later entries a chunk happens to hold (relu makes exact zeros common).

    Returns:
        int64 [T, min(topk, S)], order unspecified.
    """
    num_entries = scores_TS.shape[-1]
    arange = torch.arange(num_entries, device=scores_TS.device)
    # One sortable integer per entry: the score's bits (order-preserving), then the reversed index.
    bits = (scores_TS.float() + 0.0).view(torch.int32).long()  # + 0.0 turns -0 into 0
    ordered = torch.where(bits < 0, -(2**31) - bits - 1, bits)
    keys = ordered * 2**32 + (num_entries - 1 - arange)
    hidden = arange >= visible_T.unsqueeze(-1)
    best = keys.masked_fill(hidden, torch.iinfo(torch.int64).min).topk(
        min(topk, num_entries), dim=-1
    )
    return best.indices.masked_fill(hidden.gather(-1, best.indices), -1)


def sparse_attention(
    q_THC: Tensor, kv_SC: Tensor, sink_H: Tensor, index_TK: Tensor, scale: float
) -> Tensor:
    """Attention of each query over its own list of entries, key and value being the same vector.

    p_j = exp(l_j - m) / (sum_j exp(l_j - m) + exp(sink_h - m)); the sink takes weight and adds
    nothing. Probabilities are rounded to the dtype of ``kv_SC`` before the product, accumulation
    is wide.

    Args:
        index_TK: rows of ``kv_SC``; -1 is masked. Every query needs at least one entry.

    Returns:
        [T, H, C] in the dtype of ``q_THC``.
    """
    chosen_TKC = wide(kv_SC[index_TK.clamp_min(0)])
    logits_THK = (wide(q_THC) @ chosen_TKC.transpose(-1, -2)) * scale
    logits_THK = logits_THK.masked_fill((index_TK < 0).unsqueeze(-2), -torch.inf)
    top_TH1 = logits_THK.amax(-1, keepdim=True)
    weight = torch.exp(logits_THK - top_TH1)
    total = weight.sum(-1, keepdim=True) + torch.exp(wide(sink_H).unsqueeze(-1) - top_TH1)
    p_THK = wide((weight / total).to(kv_SC.dtype))
    return (p_THK @ chosen_TKC).to(q_THC.dtype)


# ---- mixture of experts (report 2.4) ------------------------------------------------------------


def affinity(logits_NE: Tensor) -> Tensor:
    """Router score: sqrt(softplus(logit)), float32."""
    return torch.nn.functional.softplus(logits_NE).sqrt()


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), computed and returned wide."""
    gate = wide(gate).clamp(max=limit)
    up = wide(up).clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


# ---- rotary frequencies (report 2.3.4; YaRN without attention factor) ---------------------------


def rotary_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Angular frequency per pair in radians per token; float64 [dim/2].

    With ``factor`` > 1, YaRN: pairs that turn more than ``beta_fast`` times over
    ``original_length`` keep their frequency, those under ``beta_slow`` are divided by ``factor``,
    with a linear ramp between.
    """
    # On the CPU even inside `with torch.device("meta")`: the values are computed, never loaded, and
    # on meta this one call would import torch's compiler, a second of every start.
    pair = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    freq = theta ** (-2.0 * pair / dim)
    if factor == 1.0:
        return freq

    def pair_with(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), dim - 1)
    ramp = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq / factor * ramp + freq * (1 - ramp)
