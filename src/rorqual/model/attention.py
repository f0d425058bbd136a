"""Shared-KV attention over a window and compressed entries: the three layer kinds of V4.

ratio 0: sliding window only. ratio 4 (CSA): window + entries the indexer selects. Larger ratios
(HCA): window + every finished entry. Report 2.3, eq. 9-27. One key/value vector per token serves
all heads; outputs are rotated back so that positions are relative; the output projection is
grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, packed, reference
from rorqual.model.compressor import Compressor
from rorqual.model.config import ModelConfig, is_overlapping
from rorqual.model.indexer import Indexer
from rorqual.model.linear import Linear
from rorqual.model.norm import RMSNorm
from rorqual.model.packed import PackedBatch
from rorqual.model.rope import RotaryTable, Rotation
from rorqual.model.state import CompressorState, LayerState

# Gathered keys held at once by the reference path, in elements (64 MiB of float32).
_GATHER_LIMIT = 1 << 24


@dataclass(frozen=True)
class Ragged:
    """Where each sequence's tokens lie in a flat batch, and the rotations of both layer kinds."""

    spans: list[tuple[int, int]]
    """Half-open token range per sequence."""
    positions_N: Tensor
    plain: Rotation
    compressing: Rotation


class Attention(nn.Module):
    """One attention sub-layer; input and output are [.., D]."""

    def __init__(self, config: ModelConfig, ratio: int, rope: RotaryTable) -> None:
        super().__init__()
        self.ratio = ratio
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.window = config.sliding_window
        self.groups = config.o_groups
        self.eps = config.rms_norm_eps
        self.official = config.numerics == "official"
        self.scale = config.head_dim**-0.5
        self._rope = [rope]  # shared by all layers: in a list so that it is not a submodule here

        def linear(inputs: int, outputs: int, *, quantize_input: bool = True) -> Linear:
            return Linear(
                inputs,
                outputs,
                weight_format=config.linear_dtype,
                quantize_input=quantize_input and self.official,
            )

        heads = self.num_heads * self.head_dim
        self.wq_a = linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = linear(config.q_lora_rank, heads)
        self.wkv = linear(config.hidden_size, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.zeros(self.num_heads))
        # The reference applies wo_a in BF16, without rounding its input.
        self.wo_a = linear(
            heads // self.groups, self.groups * config.o_lora_rank, quantize_input=False
        )
        self.wo_b = linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.compressor = Compressor(config, ratio, self.head_dim, rotated=False) if ratio else None
        self.indexer = Indexer(config, ratio) if is_overlapping(ratio) else None

    @property
    def rope(self) -> RotaryTable:
        return self._rope[0]

    def new_state(self) -> LayerState:
        """An empty memory for one sequence."""
        return LayerState(
            compressed=CompressorState() if self.compressor is not None else None,
            index=CompressorState() if self.indexer is not None else None,
        )

    # ---- inference: ragged batches with state --------------------------------------------------
    def forward(self, x_ND: Tensor, ragged: Ragged, states: Sequence[LayerState]) -> Tensor:
        """Attend and advance ``states`` (one per span) by the tokens given; [N, D]."""
        rotation = ragged.compressing if self.ratio else ragged.plain
        latent, q_NHC, kv_NC = self._project(x_ND, rotation)
        pooled = self.compressor.project(x_ND, ragged.positions_N) if self.compressor else None
        index = self._index_inputs(x_ND, latent, rotation, ragged) if self.indexer else None
        outputs = []
        for (start, end), state in zip(ragged.spans, states, strict=True):
            here = slice(start, end)
            visible_T = (ragged.positions_N[here] + 1) // self.ratio if self.ratio else None
            if self.compressor is not None and pooled is not None:
                assert state.compressed is not None
                self.compressor.extend(
                    pooled[0][here], pooled[1][here], state.compressed, self.rope, x_ND.dtype
                )
            chosen_TK = self._choose(index, here, state, visible_T)
            outputs.append(self._attend(q_NHC[here], kv_NC[here], state, chosen_TK))
        return self._output(torch.cat(outputs), rotation)

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query latent [..., q_lora], rotated queries [..., H, C], rotated entry [..., C]."""
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (self.num_heads, self.head_dim))
        q = reference.rotate(reference.rms_norm(q, None, self.eps), *rotation.per_head())
        kv = reference.rotate(self.kv_norm(self.wkv(x)), *rotation)
        if self.official:
            kv = reference.round_entry(kv, self.rope_dim)
        return latent, q, kv

    def _index_inputs(
        self, x: Tensor, latent: Tensor, rotation: Rotation, ragged: Ragged
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.indexer is not None
        q, weight = self.indexer.queries(latent, x, rotation)
        return q, weight, *self.indexer.compressor.project(x, ragged.positions_N)

    def _choose(
        self,
        index: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        here: slice,
        state: LayerState,
        visible_T: Tensor | None,
    ) -> Tensor | None:
        """Compressed entries each query attends to, [T, K] with -1 masked; None if there are none.

        Advances the indexer's state.
        """
        if visible_T is None or state.compressed is None:
            return None
        if self.indexer is not None and index is not None:
            assert state.index is not None
            q, weight, values, scores = index
            self.indexer.compressor.extend(
                values[here], scores[here], state.index, self.rope, q.dtype
            )
            keys_SC = state.index.entries.view()
            if keys_SC is None:
                return None
            return self.indexer.select(q[here], weight[here], keys_SC, visible_T)
        count = len(state.compressed.entries)
        return reference.visible_entries(count, visible_T) if count else None

    def _attend(
        self, q_THC: Tensor, kv_TC: Tensor, state: LayerState, chosen_TK: Tensor | None
    ) -> Tensor:
        """Window + chosen entries, one softmax; keeps the last window of entries in ``state``."""
        num_tokens = kv_TC.shape[0]
        past = 0 if state.window is None else state.window.shape[0]
        recent_SC = kv_TC if state.window is None else torch.cat((state.window, kv_TC))
        state.window = recent_SC[-self.window :].clone()
        rows = torch.arange(past, past + num_tokens, device=kv_TC.device).unsqueeze(-1)
        span = min(self.window, past + num_tokens)
        index_TK = rows - torch.arange(span, device=kv_TC.device)
        index_TK = index_TK.clamp_min(-1)
        kv_SC = recent_SC
        if chosen_TK is not None:
            assert state.compressed is not None
            entries_SC = state.compressed.entries.view()
            assert entries_SC is not None
            if num_tokens == 1:  # touch only what one query selected, however long the past
                chosen = chosen_TK[0][chosen_TK[0] >= 0]
                entries_SC = entries_SC[chosen]
                chosen_TK = torch.arange(len(chosen), device=kv_TC.device).unsqueeze(0)
            shifted = torch.where(chosen_TK >= 0, chosen_TK + recent_SC.shape[0], -1)
            index_TK = torch.cat((index_TK, shifted), dim=-1)
            kv_SC = torch.cat((recent_SC, entries_SC))
        kernels = dispatch.kernels_for(q_THC)
        step = max(1, _GATHER_LIMIT // (index_TK.shape[-1] * self.head_dim))
        return torch.cat(
            [
                kernels.sparse_attention(
                    q_THC[i : i + step], kv_SC, self.attn_sink, index_TK[i : i + step], self.scale
                )
                for i in range(0, num_tokens, step)
            ]
        )

    def _output(self, o: Tensor, rotation: Rotation) -> Tensor:
        """Rotate back, project per group, mix the groups; [..., H, C] -> [..., D]."""
        o = reference.rotate(o, *rotation.per_head(), inverse=True)
        grouped = o.flatten(-2).unflatten(-1, (self.groups, -1))
        weight = self.wo_a.dequantized().to(o.dtype).unflatten(0, (self.groups, -1))
        z = torch.einsum("...gi,gri->...gr", grouped, weight)
        out: Tensor = self.wo_b(z.flatten(-2))
        return out

    # ---- training: packed rows, no state -------------------------------------------------------
    def forward_packed(
        self,
        x_BTD: Tensor,
        batch: PackedBatch,
        layout: packed.AttentionLayout,
        rotation: Rotation,
        *,
        indexer_loss: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Dense attention over all visible entries; optionally the indexer's KL loss (report 2.3).

        The indexer learns to rank what the attention used; its loss reaches no other parameter.
        """
        latent, q_BTHC, kv_BTC = self._project(x_BTD, rotation)
        entries_BSC = None
        if self.compressor is not None:
            entries_BSC = self.compressor.forward_packed(x_BTD, batch, self.rope)
        out_BTHC, used = packed.attention(
            q_BTHC, kv_BTC, entries_BSC, self.attn_sink, layout, self.scale
        )
        loss = None
        if indexer_loss and self.indexer is not None:
            rows = (batch.targets_BT >= 0).flatten().nonzero().squeeze(-1)
            x, latent = x_BTD.detach(), latent.detach()
            flat = Rotation(*(t.flatten(0, 1)[rows] for t in rotation))
            q, weight = self.indexer.queries(
                latent.flatten(0, 1)[rows], x.flatten(0, 1)[rows], flat
            )
            keys_BSC = self.indexer.compressor.forward_packed(x, batch, self.rope)
            loss = packed.indexer_loss(q, weight, keys_BSC, rows, layout, used)
        return self._output(out_BTHC, rotation), loss
