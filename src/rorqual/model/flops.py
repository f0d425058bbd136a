"""Floating-point operations per token of a V4 config, by formula. Nothing is measured.

Counted are products of matrices, two operations per multiply-add. Left out is what is linear in a
vector: norms, softmax, pooling, rotation, rounding, Sinkhorn, top-k, the sum over indexer heads.
MTP blocks are left out, as in the published numbers.

An operation costs its time on hardware whose speed doubles as the width halves, in units of one FP8
operation: ``COST``. The report does not print its accounting; this one gives both of its ratios.

Symbols
    d hidden · H heads · c head width · q query latent · o latent per output group · G groups
    h indexer heads · i indexer width · k entries selected · w window · m ratio of a layer
    E experts · K of them chosen · S shared · f expert width · n streams · V vocabulary
    t tokens of context, the computed one included
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rorqual.model.config import ModelConfig, is_overlapping

Precision = Literal["FP4", "FP8", "BF16"]
COST: dict[Precision, float] = {"FP4": 0.5, "FP8": 1.0, "BF16": 2.0}
"""FP8 operations that take as long as one operation of this precision."""


@dataclass(frozen=True)
class Part:
    """One part of the network, per token; all layers together."""

    name: str
    flops: float
    precision: Precision

    @property
    def cost(self) -> float:
        """FP8-equivalent operations."""
        return self.flops * COST[self.precision]


@dataclass(frozen=True)
class TokenFlops:
    """What one token takes, part by part."""

    parts: tuple[Part, ...]

    @property
    def flops(self) -> float:
        """Operations of any precision."""
        return sum(part.flops for part in self.parts)

    @property
    def cost(self) -> float:
        """FP8-equivalent operations."""
        return sum(part.cost for part in self.parts)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence, computed together; all numbers are means over them."""

    first: int
    """Context of the first token, itself included (>= 1)."""
    last: int
    """Context of the last token."""

    @classmethod
    def decode(cls, context: int) -> Span:
        """The one token that completes a context of ``context`` tokens."""
        return cls(context, context)

    @classmethod
    def prefill(cls, context: int) -> Span:
        """Every token of a prompt of ``context`` tokens."""
        return cls(1, context)

    @property
    def num_tokens(self) -> int:
        """Tokens computed; only the last of them passes the head."""
        return self.last - self.first + 1

    def visible(self, ratio: int, limit: int | None = None) -> float:
        """Mean of min(limit, floor(t / ratio)): finished groups a token may attend to."""
        total = _sum_visible(self.last, ratio, limit) - _sum_visible(self.first - 1, ratio, limit)
        return total / self.num_tokens


def _sum_visible(last: int, ratio: int, limit: int | None) -> int:
    """Sum over t = 1..last of min(limit, t // ratio), exactly."""
    full = last if limit is None else min(last, limit * ratio - 1)
    groups, rest = divmod(max(full, 0) + 1, ratio)
    below = ratio * groups * (groups - 1) // 2 + groups * rest
    return below if limit is None else below + limit * max(0, last - full)


def token_flops(config: ModelConfig, span: Span) -> TokenFlops:
    """Operations per token of ``span``, mean.

    per layer
        attention projections   2 (d q + q H c + d c + H c o + G o d)
        attention               4 H c (min(w, t) + e),  e = 0                     window layers
                                                        min(k, floor(t / 4))      CSA
                                                        floor(t / m)              HCA
        compressor              4 b c d,  b = 2 for CSA, 1 for HCA
        indexer projections     2 (q h i + d h) + 8 i d                           CSA
        indexer scores          2 h i floor(t / 4)                                CSA
        router                  2 d E
        routed experts          6 d f K
        shared expert           6 d f S
        mHC                     twice (projection, read, write): 2 n d ((2 n + n^2) + 1 + n)
    once
        mHC                     2 n d (n + 1)
        head                    2 d V, of the last token only

    Scores are counted also where so few entries exist that all are selected.
    Attention runs in BF16, indexer scores in FP4, everything else counts as FP8.
    """
    d, c, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    q, o, groups = config.q_lora_rank, config.o_lora_rank, config.o_groups
    h, i, n = config.index_n_heads, config.index_head_dim, config.hc_mult
    f, layers = config.moe_intermediate_size, config.num_hidden_layers
    ratios = config.compress_ratios[:layers]
    csa = [m for m in ratios if is_overlapping(m)]
    hca = [m for m in ratios if m and not is_overlapping(m)]

    entries = (
        layers * span.visible(1, config.sliding_window)
        + sum(span.visible(m, config.index_topk) for m in csa)
        + sum(span.visible(m) for m in hca)
    )
    projections = d * q + q * heads * c + d * c + heads * c * o + groups * o * d
    mixing = 2 * n * d * ((2 * n + n * n) + 1 + n)
    return TokenFlops(
        (
            Part("attention projections", 2 * projections * layers, "FP8"),
            Part("attention", 4 * heads * c * entries, "BF16"),
            Part("compressor", 4 * c * d * (2 * len(csa) + len(hca)), "FP8"),
            Part("indexer projections", (2 * (q * h * i + d * h) + 8 * i * d) * len(csa), "FP8"),
            Part("indexer scores", 2 * h * i * sum(map(span.visible, csa)), "FP4"),
            Part("router", 2 * d * config.n_routed_experts * layers, "FP8"),
            Part("routed experts", 6 * d * f * config.num_experts_per_tok * layers, "FP8"),
            Part("shared expert", 6 * d * f * config.n_shared_experts * layers, "FP8"),
            Part("mHC", 2 * mixing * layers + 2 * n * d * (n + 1), "FP8"),
            Part("head", 2 * d * config.vocab_size / span.num_tokens, "FP8"),
        )
    )


def part_names(tokens: Iterable[TokenFlops]) -> list[str]:
    """Names of all parts of several models, each once, in order of appearance."""
    return list(dict.fromkeys(part.name for token in tokens for part in token.parts))
