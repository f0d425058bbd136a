"""One V4 block: attention and mixture of experts, each reading and writing the residual streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, packed
from rorqual.kernels.packed import AttentionLayout
from rorqual.kernels.reference import StreamMixing
from rorqual.model.attention import Attention, Ragged
from rorqual.model.config import ModelConfig
from rorqual.model.linear import Linear
from rorqual.model.moe import MoE
from rorqual.model.norm import RMSNorm
from rorqual.model.packed import PackedBatch, RouterStats
from rorqual.model.rope import RotaryTable, Rotation
from rorqual.model.state import LayerState

EnterStreams = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
LeaveStreams = Callable[..., Tensor]


class Block(nn.Module):
    """Streams in, streams out: [N, M, D]. Report 2.2 eq. 3-8 around each sub-layer."""

    def __init__(self, config: ModelConfig, ratio: int, rope: RotaryTable, *, hashed: bool) -> None:
        super().__init__()
        m, width = config.hc_mult, config.hc_mult * config.hidden_size
        rows = 2 * m + m * m
        self._constants = (config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
        self.compiled: tuple[EnterStreams, LeaveStreams] | None = None
        """``packed.enter_streams`` and ``leave_streams``, compiled; used where gradients flow."""
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio, rope)
        self.ffn = MoE(config, hashed=hashed)
        self.hc_attn_fn = nn.Parameter(torch.zeros(rows, width))
        self.hc_attn_base = nn.Parameter(torch.zeros(rows))
        self.hc_attn_scale = nn.Parameter(torch.ones(3))
        self.hc_ffn_fn = nn.Parameter(torch.zeros(rows, width))
        self.hc_ffn_base = nn.Parameter(torch.zeros(rows))
        self.hc_ffn_scale = nn.Parameter(torch.ones(3))

    def _connection(self, kind: str) -> tuple[Tensor, Tensor, Tensor, RMSNorm]:
        """Hyper-connection weights and norm of the ``attn`` or ``ffn`` sub-layer."""
        fn, scale, base = (getattr(self, f"hc_{kind}_{part}") for part in ("fn", "scale", "base"))
        return fn, scale, base, getattr(self, f"{kind}_norm")

    def _enter(self, streams_NMD: Tensor, kind: str) -> tuple[Tensor, StreamMixing]:
        """Normalised input of a sub-layer, and how its output is to be written back."""
        fn, scale, base, norm = self._connection(kind)
        iterations, eps, norm_eps = self._constants
        kernels = dispatch.kernels_for(streams_NMD)
        mixing = kernels.stream_mixing(
            streams_NMD, fn, scale, base, iterations=iterations, eps=eps, norm_eps=norm_eps
        )
        return norm(kernels.read_streams(streams_NMD, mixing.pre_NM)), mixing

    def forward(
        self, streams_NMD: Tensor, tokens_N: Tensor, ragged: Ragged, states: Sequence[LayerState]
    ) -> Tensor:
        """Inference step; advances ``states``, one per sequence of the ragged batch."""
        kernels = dispatch.kernels_for(streams_NMD)
        x_ND, mixing = self._enter(streams_NMD, "attn")
        out_ND = self.attn(x_ND, ragged, states)
        streams_NMD = kernels.write_streams(out_ND, streams_NMD, mixing)
        x_ND, mixing = self._enter(streams_NMD, "ffn")
        return kernels.write_streams(self.ffn(x_ND, tokens_N), streams_NMD, mixing)

    def forward_packed(
        self,
        streams_NMD: Tensor,
        tokens_N: Tensor,
        batch: PackedBatch,
        layout: AttentionLayout,
        rotation: Rotation,
        *,
        indexer_loss: bool,
    ) -> tuple[Tensor, RouterStats | None, Tensor | None]:
        """Training step over N = B * T packed tokens."""
        rows = batch.sample_BT.shape
        enter, leave = packed.enter_streams, packed.leave_streams
        if self.compiled and torch.is_grad_enabled():  # evaluation comes in shapes of its own
            enter, leave = self.compiled
        fn, scale, base, norm = self._connection("attn")
        x_ND, _, post, comb = enter(streams_NMD, fn, scale, base, norm.weight, *self._constants)
        out_BTD, loss = self.attn.forward_packed(
            x_ND.unflatten(0, rows), batch, layout, rotation, indexer_loss=indexer_loss
        )
        streams_NMD = leave(out_BTD.flatten(0, 1), streams_NMD, post, comb)
        fn, scale, base, norm = self._connection("ffn")
        x_ND, _, post, comb = enter(streams_NMD, fn, scale, base, norm.weight, *self._constants)
        real_N = batch.sample_BT.flatten() >= 0
        out_ND, stats = self.ffn.forward_packed(x_ND, tokens_N, real_N)
        return leave(out_ND, streams_NMD, post, comb), stats, loss


class MTPBlock(Block):
    """Multi-token prediction, depth 1 (report 2.1): predicts one token beyond the trunk.

    Input streams are the trunk's before its head; the embedding is of the following token.
    """

    def __init__(self, config: ModelConfig, ratio: int, rope: RotaryTable) -> None:
        super().__init__(config, ratio, rope, hashed=False)
        width, eps, m = config.hidden_size, config.rms_norm_eps, config.hc_mult
        official = config.numerics == "official"
        self.e_proj = Linear(
            width, width, weight_format=config.linear_dtype, quantize_input=official
        )
        self.h_proj = Linear(
            width, width, weight_format=config.linear_dtype, quantize_input=official
        )
        self.enorm = RMSNorm(width, eps)
        self.hnorm = RMSNorm(width, eps)
        self.norm = RMSNorm(width, eps)
        self.hc_head_fn = nn.Parameter(torch.zeros(m, m * width))
        self.hc_head_base = nn.Parameter(torch.zeros(m))
        self.hc_head_scale = nn.Parameter(torch.ones(1))

    def combine(self, streams_NMD: Tensor, next_embedding_ND: Tensor) -> Tensor:
        """X' = e_proj(enorm(embedding)) on every stream + h_proj(hnorm(X))."""
        shared: Tensor = self.e_proj(self.enorm(next_embedding_ND))
        own: Tensor = self.h_proj(self.hnorm(streams_NMD))
        return shared.unsqueeze(-2) + own
