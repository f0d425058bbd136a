"""Differentiable kernels for training over packed rows.

Stream mixing in a form that torch.compile fuses (products of many 4 x 4 matrices are a loop of
single products on a CPU), and attention that is dense within what a query may see: queries are
processed in blocks of one window against the previous and own block of raw entries plus all
compressed entries, one softmax with sink. Heads share keys, so they are folded into the rows of
one large product. ``tests/equivalence/test_packed.py`` holds it to the reference.

Shape suffixes as in ``reference``; B rows, T tokens per row, U query blocks per row, W window,
L keys per block (2 W + S).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import reference


def enter_streams(
    streams_NMD: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.stream_mixing``, ``read_streams``, ``rms_norm``: (x, pre, post, comb)."""
    mixing = reference.stream_mixing(
        streams_NMD, fn, scale, base, iterations=iterations, eps=eps, norm_eps=norm_eps
    )
    u_ND = (mixing.pre_NM.unsqueeze(-1) * streams_NMD).sum(-2)
    return reference.rms_norm(u_ND, norm_weight, norm_eps), *mixing


def leave_streams(out_ND: Tensor, streams_NMD: Tensor, post_NM: Tensor, comb_NMM: Tensor) -> Tensor:
    """``reference.write_streams`` without matrix products."""
    f = reference.wide(out_ND)
    new = [
        post_NM[:, k : k + 1] * f + (comb_NMM[:, :, k].unsqueeze(-1) * streams_NMD).sum(-2)
        for k in range(streams_NMD.shape[-2])
    ]
    return torch.stack(new, dim=-2)


@dataclass(frozen=True)
class AttentionLayout:
    """Which keys each query of a packed batch may see, for one window and ratio."""

    window: int
    mask_BUWL: Tensor
    """bool, True where visible. Keys: previous block, own block, then the S entries of the row."""

    @classmethod
    def build(cls, sample: Tensor, position: Tensor, window: int, ratio: int) -> AttentionLayout:
        """sample, position: int64 [B, T] as in ``PackedBatch``; T a multiple of ``window``."""
        rows, tokens = sample.shape
        if tokens % window:
            raise ValueError(f"packed rows need a multiple of {window} tokens, got {tokens}")
        sample_BUW = sample.unflatten(1, (-1, window))
        before = torch.nn.functional.pad(sample_BUW[:, :-1], (0, 0, 1, 0), value=-2)
        keys_BUL = torch.cat((before, sample_BUW), dim=-1)
        query = torch.arange(window, device=sample.device).unsqueeze(-1) + window
        key = torch.arange(2 * window, device=sample.device)
        near = (query >= key) & (query - key < window)
        mask = near & (sample_BUW.unsqueeze(-1) == keys_BUL.unsqueeze(-2))
        if ratio:
            owner_BS, start_BS = sample[:, ::ratio], position[:, ::ratio]
            visible = (position + 1) // ratio * ratio
            entry = (sample.unsqueeze(-1) == owner_BS.unsqueeze(-2)) & (
                start_BS.unsqueeze(-2) < visible.unsqueeze(-1)
            )
            mask = torch.cat((mask, entry.unflatten(1, (-1, window))), dim=-1)
        return cls(window, mask.expand(rows, -1, -1, -1))


class _BlockAttention(torch.autograd.Function):
    """softmax([q k^T, sink]) k per block, keys as values; saves one matrix of probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q_XHWC: Tensor, k_XLC: Tensor, sink_H: Tensor, mask_XWL: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        heads, width = q_XHWC.shape[1:3]
        q = q_XHWC.flatten(1, 2)
        p = (torch.bmm(q, k_XLC.transpose(1, 2)).float()).mul_(scale)
        p = p.unflatten(1, (heads, width))
        p.masked_fill_(~mask_XWL.unsqueeze(1), -torch.inf)
        sink = sink_H.float().view(1, heads, 1, 1)
        top = torch.maximum(p.amax(-1, keepdim=True), sink)
        p.sub_(top).exp_()
        sink_p = torch.exp(sink - top)
        total = p.sum(-1, keepdim=True).add_(sink_p)
        p.div_(total)
        sink_p = sink_p / total
        p = p.to(k_XLC.dtype)
        out = torch.bmm(p.flatten(1, 2), k_XLC)
        ctx.save_for_backward(q, k_XLC, p, out, sink_p)
        ctx.scale = scale
        ctx.mark_non_differentiable(p)
        return out.unflatten(1, (heads, width)), p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, p, out, sink_p = ctx.saved_tensors
        _, heads, width, _ = p.shape
        g = grads[0].to(k.dtype).contiguous().flatten(1, 2)
        delta = (g.float() * out.float()).sum(-1, keepdim=True)
        flat_p = p.flatten(1, 2)
        ds = torch.bmm(g, k.transpose(1, 2)).float().sub_(delta).mul_(flat_p).mul_(ctx.scale)
        ds = ds.to(k.dtype)
        dq = torch.bmm(ds, k)
        dk = torch.bmm(ds.transpose(1, 2), q)
        dk = torch.baddbmm(dk, flat_p.transpose(1, 2), g)
        dsink = -(sink_p.flatten(1, 2) * delta).unflatten(1, (heads, width)).sum((0, 2, 3))
        return dq.unflatten(1, (heads, width)), dk, dsink, None, None


def attention(
    q_BTHC: Tensor,
    kv_BTC: Tensor,
    entries_BSC: Tensor | None,
    sink_H: Tensor,
    layout: AttentionLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend within samples; returns outputs [B, T, H, C] and probabilities [B*U, H, W, L]."""
    rows = q_BTHC.shape[0]
    window = layout.window
    blocks = kv_BTC.unflatten(1, (-1, window))
    before = torch.nn.functional.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0))
    keys = torch.cat((before, blocks), dim=2)
    if entries_BSC is not None:
        shared = entries_BSC.unsqueeze(1).expand(-1, keys.shape[1], -1, -1)
        keys = torch.cat((keys, shared.to(keys.dtype)), dim=2)
    q = q_BTHC.unflatten(1, (-1, window)).flatten(0, 1).transpose(1, 2)
    # The backward pass runs outside autocast, so the working type is fixed here.
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
    with torch.autocast(kind, enabled=False):
        out, p = _BlockAttention.apply(  # type: ignore[no-untyped-call]
            q.to(dtype).contiguous(),
            keys.to(dtype).flatten(0, 1),
            sink_H,
            layout.mask_BUWL.flatten(0, 1),
            scale,
        )
    return out.transpose(1, 2).unflatten(0, (rows, -1)).flatten(1, 2), p


def indexer_loss(
    q_NHC: Tensor,
    weight_NH: Tensor,
    keys_BSC: Tensor,
    rows_N: Tensor,
    layout: AttentionLayout,
    used_XHWL: Tensor,
) -> Tensor:
    """Mean KL(attention over compressed entries || softmax of indexer scores) over chosen queries.

    The target is the head-averaged probability on compressed entries, renormalised. Queries that
    see no entry contribute nothing.

    Args:
        rows_N: flat token numbers (b * T + t) of the queries.
    """
    num_entries = keys_BSC.shape[1]
    window = layout.window
    block, offset = rows_N // window, rows_N % window
    visible_NS = layout.mask_BUWL.flatten(0, 1)[block, offset, 2 * window :]
    target_NS = used_XHWL[block, :, offset, 2 * window :].float().mean(1)
    keep = visible_NS.any(-1)
    if not bool(keep.any()):
        return keys_BSC.sum() * 0.0
    target_NS = target_NS / target_NS.sum(-1, keepdim=True).clamp_min(1e-9)
    row = rows_N // (window * layout.mask_BUWL.shape[1])
    scores = q_NHC.new_zeros(rows_N.shape[0], num_entries, dtype=torch.float32)
    for b in range(keys_BSC.shape[0]):  # each row of the batch has its own keys
        mine = (row == b).nonzero().squeeze(-1)
        dots = (q_NHC[mine] @ keys_BSC[b].to(q_NHC.dtype).T).relu()
        found = (dots.float() * weight_NH[mine].float().unsqueeze(-1)).sum(1)
        scores = scores.index_copy(0, mine, found)
    log_p = scores.masked_fill(~visible_NS, -torch.inf).log_softmax(-1)
    log_p = log_p.masked_fill(~visible_NS, 0.0)
    entropy = torch.xlogy(target_NS, target_NS)
    return (entropy - target_NS * log_p).sum(-1)[keep].mean()
