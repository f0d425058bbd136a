"""The V4 network: token ids in, logits out, for inference with state and for training.

The path of a token: embed -> M equal residual streams -> blocks -> merged streams -> norm -> head
(technical report, arXiv 2606.19348, section 2; "report" and a number mean it throughout). Parameter
names are the official checkpoint's. Inference takes ragged batches: any mix of prefill chunks and
decode steps of any sequences, so that a scheduler needs one entry point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rorqual.kernels import packed, reference
from rorqual.kernels.packed import AttentionLayout
from rorqual.model import initial
from rorqual.model.attention import Ragged
from rorqual.model.block import Block, MTPBlock
from rorqual.model.config import ModelConfig
from rorqual.model.norm import RMSNorm
from rorqual.model.packed import PackedBatch, PackedOutput, RouterStats
from rorqual.model.rope import RotaryTable
from rorqual.model.state import Segment, SequenceState


class Vocabulary(nn.Module):
    """One row per token id: the embedding, and the head (not tied)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))


class Transformer(nn.Module):
    """A V4 model. Weights are uninitialised until ``init_weights`` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_plain = RotaryTable(config, compressing=False)
        self.rope_compressing = RotaryTable(config, compressing=True)
        depth, width, m = config.num_hidden_layers, config.hidden_size, config.hc_mult

        def rope(ratio: int) -> RotaryTable:
            return self.rope_compressing if ratio else self.rope_plain

        self.embed = Vocabulary(config.vocab_size, width)
        self.layers = nn.ModuleList(
            Block(config, ratio, rope(ratio), hashed=i < config.num_hash_layers)
            for i, ratio in enumerate(config.compress_ratios[:depth])
        )
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.head = Vocabulary(config.vocab_size, width)
        self.hc_head_fn = nn.Parameter(torch.zeros(m, m * width))
        self.hc_head_base = nn.Parameter(torch.zeros(m))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.mtp = nn.ModuleList(
            MTPBlock(config, ratio, rope(ratio)) for ratio in config.compress_ratios[depth:]
        )

    # ---- inference -----------------------------------------------------------------------------
    def new_state(self) -> SequenceState:
        """Empty memory for one sequence. A state serves one sequence and is never cleared."""
        return SequenceState(
            [block.attn.new_state() for block in self._blocks(self.layers)],
            [block.attn.new_state() for block in self._blocks(self.mtp)],
        )

    @torch.inference_mode()
    def forward(
        self, tokens_N: Tensor, segments: Sequence[Segment], *, all_logits: bool = False
    ) -> Tensor:
        """Run the next tokens of several sequences and advance their states.

        Args:
            tokens_N: int64, the segments' tokens one after another; segment i owns the next
                ``segments[i].num_tokens`` (>= 1) of them. A state may appear once.
            all_logits: logits of every token instead of each segment's last.

        Returns:
            float32 [len(segments), vocab], or [N, vocab] with ``all_logits``.

        Raises:
            ValueError: the token count does not match the segments.
        """
        streams_NMD = self.run(tokens_N, segments)
        if not all_logits:
            last = torch.tensor([s.num_tokens for s in segments]).cumsum(0) - 1
            streams_NMD = streams_NMD[last.to(streams_NMD.device)]
        return self.project(self.norm(self._merge(self, streams_NMD)))

    @torch.inference_mode()
    def run(self, tokens_N: Tensor, segments: Sequence[Segment]) -> Tensor:
        """As ``forward``, returning the residual streams [N, M, D] before the head."""
        segments = list(segments)
        self._check(tokens_N, segments)
        ragged = self._ragged(segments, tokens_N.device)
        streams_NMD = self._embed(tokens_N)
        for i, block in enumerate(self.layers):
            states = [s.state.layers[i] for s in segments]
            streams_NMD = block(streams_NMD, tokens_N, ragged, states)
        for segment in segments:
            segment.state.length += segment.num_tokens
        return streams_NMD

    @torch.inference_mode()
    def draft(
        self,
        streams_NMD: Tensor,
        tokens_N: Tensor,
        next_tokens_N: Tensor,
        segments: Sequence[Segment],
    ) -> Tensor:
        """MTP logits [N, vocab] for the token after ``next_tokens_N``.

        Call it on exactly what ``run`` was just given, so that its window advances with the trunk.

        Args:
            streams_NMD: what ``run`` returned; tokens_N: what it was given.
            next_tokens_N: the token that follows each of them.
        """
        block = self._mtp_block()
        segments = list(segments)
        ragged = self._ragged(segments, tokens_N.device, consumed=True)
        mixed = block.combine(streams_NMD, self._lookup(next_tokens_N))
        out = block(mixed, next_tokens_N, ragged, [s.state.mtp[0] for s in segments])
        return self.project(block.norm(self._merge(block, out)))

    # ---- training ------------------------------------------------------------------------------
    def forward_packed(
        self, batch: PackedBatch, *, mtp: bool = True, indexer_loss: bool = True
    ) -> PackedOutput:
        """Hidden states of packed rows, with what the auxiliary losses need. Differentiable.

        mtp: also run the MTP block. indexer_loss: also compute the indexers' KL loss.
        """
        rows = batch.tokens_BT.shape
        tokens_N = batch.tokens_BT.flatten()
        rotations = (self.rope_plain(batch.position_BT), self.rope_compressing(batch.position_BT))
        layouts = {
            ratio: AttentionLayout.build(
                batch.sample_BT, batch.position_BT, self.config.sliding_window, ratio
            )
            for ratio in set(self.config.compress_ratios)
        }
        streams_NMD = self._embed(tokens_N)
        router: list[RouterStats] = []
        losses: list[Tensor] = []

        def step(block: Block, streams: Tensor, tokens: Tensor) -> Tensor:
            ratio = block.attn.ratio
            streams, stats, loss = block.forward_packed(
                streams,
                tokens,
                batch,
                layouts[ratio],
                rotations[1 if ratio else 0],
                indexer_loss=indexer_loss,
            )
            if stats is not None:
                router.append(stats)
            if loss is not None:
                losses.append(loss)
            return streams

        for block in self._blocks(self.layers):
            streams_NMD = step(block, streams_NMD, tokens_N)
        hidden = self.norm(self._merge(self, streams_NMD)).unflatten(0, rows)
        mtp_hidden = None
        if mtp and self.mtp:
            ahead = self._mtp_block()
            next_N = batch.tokens_BT.roll(-1, dims=1).flatten()
            mixed = step(ahead, ahead.combine(streams_NMD, self._lookup(next_N)), next_N)
            mtp_hidden = ahead.norm(self._merge(ahead, mixed)).unflatten(0, rows)
        loss = torch.stack(losses).mean() if losses else None
        return PackedOutput(hidden, mtp_hidden, router, loss)

    def project(self, hidden_ND: Tensor) -> Tensor:
        """Logits, float32 [N, vocab]."""
        hidden = reference.wide(hidden_ND)
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden, self.head.weight.to(hidden.dtype))

    def compile_for_training(self) -> None:
        """Fuse the stream mixing with torch.compile: 3x less CPU time there (docs/LOG.md).

        Needs a C++ compiler at run time on CPU; takes half a minute at the first step. Shapes
        should stay fixed from step to step.
        """
        enter = torch.compile(packed.enter_streams, dynamic=False)
        leave = torch.compile(packed.leave_streams, dynamic=False)
        for block in (*self._blocks(self.layers), *self._blocks(self.mtp)):
            block.compiled = (enter, leave)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter for training from scratch, reproducibly; see ``initial.py``."""
        initial.fill(self, generator)

    # ---- parts ---------------------------------------------------------------------------------
    @staticmethod
    def _blocks(modules: nn.ModuleList) -> list[Block]:
        return [block for block in modules if isinstance(block, Block)]

    def _mtp_block(self) -> MTPBlock:
        if not self.mtp:
            raise ValueError("this model has no MTP block")
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        return block

    def _lookup(self, tokens_N: Tensor) -> Tensor:
        rows = nn.functional.embedding(tokens_N, self.embed.weight)
        return rows.to(torch.bfloat16) if self.config.numerics == "official" else rows

    def _embed(self, tokens_N: Tensor) -> Tensor:
        return self._lookup(tokens_N).unsqueeze(-2).expand(-1, self.config.hc_mult, -1)

    def _merge(self, owner: Transformer | MTPBlock, streams_NMD: Tensor) -> Tensor:
        return reference.merge_streams(
            streams_NMD,
            owner.hc_head_fn,
            owner.hc_head_scale,
            owner.hc_head_base,
            eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
        )

    def _ragged(
        self, segments: list[Segment], device: torch.device, *, consumed: bool = False
    ) -> Ragged:
        """consumed: the states have already advanced past these tokens."""
        spans, positions, start = [], [], 0
        for segment in segments:
            spans.append((start, start + segment.num_tokens))
            first = segment.state.length - (segment.num_tokens if consumed else 0)
            positions.append(torch.arange(first, first + segment.num_tokens, device=device))
            start += segment.num_tokens
        positions_N = torch.cat(positions)
        return Ragged(
            spans, positions_N, self.rope_plain(positions_N), self.rope_compressing(positions_N)
        )

    @staticmethod
    def _check(tokens_N: Tensor, segments: list[Segment]) -> None:
        total = sum(s.num_tokens for s in segments)
        if tokens_N.shape != (total,) or any(s.num_tokens < 1 for s in segments):
            raise ValueError(
                f"{tuple(tokens_N.shape)} tokens do not match segments of "
                f"{[s.num_tokens for s in segments]}"
            )
        if len({id(s.state) for s in segments}) != len(segments):
            raise ValueError("a sequence appears twice in one batch")
