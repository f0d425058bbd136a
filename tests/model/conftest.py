"""Small random networks that cover every layer kind."""

from __future__ import annotations

import pytest
import torch

from rorqual.model.config import ModelConfig, RopeScaling
from rorqual.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=8,
    moe_intermediate_size=24,
    n_routed_experts=6,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 4, 0),
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
    sliding_window=16,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65_536),
)


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A random network whose every parameter matters: norms, sinks and biases are not neutral."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            elif leaf in ("attn_sink", "bias"):
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    # Double precision: rounding must not decide a near tie between experts or entries.
    return model.double().eval() if config.numerics == "plain" else model.eval()


@pytest.fixture(scope="session")
def small() -> Transformer:
    return build(SMALL)
