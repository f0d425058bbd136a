"""DeepSeek-V3.2 as the baseline of V4's published savings: its shapes and what they cost.

Only numbers; this project does not run V3.2. Latent attention (MLA) over the 2048 tokens that the
indexer of its sparse attention (DSA) picks by scoring every token. Source: the released config and
the FlashMLA and DeepGEMM record formats. Same conventions as ``flops`` and ``cost``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.model.cost import CacheCost, WeightReads
from rorqual.model.flops import Part, Span, TokenFlops


@dataclass(frozen=True, kw_only=True)
class V32Config:
    """The shapes of V3.2, FP8 weights, as released."""

    vocab_size: int = 129_280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_dense_layers: int = 3
    """The first layers have one wide MLP in place of experts."""
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    intermediate_size: int = 18_432
    """Of the dense layers."""
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8

    @property
    def attention_parameters(self) -> int:
        """Per layer: d q + q H (a + r) + d (l + r) + l H (a + v) + H v d.

        a, v: unrotated query and value width; l: kv_lora_rank; r: rotated width.
        """
        d, q, heads = self.hidden_size, self.q_lora_rank, self.num_attention_heads
        a, v, r = self.qk_nope_head_dim, self.v_head_dim, self.qk_rope_head_dim
        latent = self.kv_lora_rank
        return (
            d * q + q * heads * (a + r) + d * (latent + r) + latent * heads * (a + v)
        ) + heads * v * d

    @property
    def indexer_parameters(self) -> int:
        """Per layer, FP8 part: q h i + d i. The head weights, d h, are BF16."""
        i = self.index_head_dim
        return self.q_lora_rank * self.index_n_heads * i + self.hidden_size * i

    @property
    def expert_parameters(self) -> int:
        """One expert of one layer: 3 d f."""
        return 3 * self.hidden_size * self.moe_intermediate_size


V3_2 = V32Config()


def token_flops(config: V32Config, span: Span) -> TokenFlops:
    """Operations per token of ``span``, mean. Symbols as in ``flops``, L layers, D dense ones.

    attention projections   2 L attention_parameters  (absorbed form: as many products)
    attention               2 L H min(k, t) ((l + r) + l)
    indexer projections     2 L (indexer_parameters + d h)
    indexer scores          2 L h i t
    dense layers            6 D d f_dense
    router, experts, head   as V4, on L - D layers

    Attention runs in BF16, indexer scores and everything else in FP8.
    """
    d, layers, latent = config.hidden_size, config.num_hidden_layers, config.kv_lora_rank
    sparse = layers - config.num_dense_layers
    h, i = config.index_n_heads, config.index_head_dim
    per_entry = config.num_attention_heads * (2 * latent + config.qk_rope_head_dim)
    expert = 2 * config.expert_parameters * sparse
    dense = config.num_dense_layers * config.intermediate_size
    return TokenFlops(
        (
            Part("attention projections", 2 * config.attention_parameters * layers, "FP8"),
            Part("attention", 2 * per_entry * span.visible(1, config.index_topk) * layers, "BF16"),
            Part("indexer projections", 2 * (config.indexer_parameters + d * h) * layers, "FP8"),
            Part("indexer scores", 2 * h * i * span.visible(1) * layers, "FP8"),
            Part("dense layers", 6 * d * dense, "FP8"),
            Part("router", 2 * d * config.n_routed_experts * sparse, "FP8"),
            Part("routed experts", expert * config.num_experts_per_tok, "FP8"),
            Part("shared expert", expert * config.n_shared_experts, "FP8"),
            Part("head", 2 * d * config.vocab_size / span.num_tokens, "FP8"),
        )
    )


def cache_cost(config: V32Config) -> CacheCost:
    """Per token and layer: l FP8 + 4 FP32 scales + r BF16 = 656, and an index key of i FP8 + 4."""
    entry = config.kv_lora_rank + 16 + 2 * config.qk_rope_head_dim
    key = config.index_head_dim + 4
    return CacheCost(
        entry_bytes=entry,
        index_key_bytes=key,
        per_token=config.num_hidden_layers * (entry + key),
        window_bytes=0,
        tail_bytes=0,
    )


def weight_reads(config: V32Config) -> WeightReads:
    """FP8 linears with one FP32 scale per 128 x 128 tile; embedding, head, router and head weights
    of the indexer BF16. Norms and biases, 0.004 % of the dense part, are left out.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    sparse = layers - config.num_dense_layers
    experts = sparse * config.expert_parameters
    fp8 = layers * (config.attention_parameters + config.indexer_parameters)
    fp8 += 3 * d * config.num_dense_layers * config.intermediate_size
    fp8 += experts * config.n_shared_experts
    bf16 = layers * d * config.index_n_heads + sparse * d * config.n_routed_experts
    bf16 += d * config.vocab_size
    return WeightReads(
        dense_bytes=_tiled(fp8) + 2 * bf16,
        routed_bytes=_tiled(experts * config.n_routed_experts),
        row_bytes=2 * d,
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
    )


def _tiled(parameters: int) -> int:
    return parameters + 4 * parameters // 128**2
