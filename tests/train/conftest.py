"""The nano tokenizer and networks small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.model.config import ModelConfig, RopeScaling
from rorqual.model.transformer import Transformer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.data import Difficulty

NANO = Path(__file__).parents[2] / "models" / "nano-flash"

# Every layer kind, hash and score routing, MTP; the nano models' vocabulary.
SMALL = ModelConfig(
    vocab_size=4096,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=1,
    o_lora_rank=16,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 0),
    index_n_heads=2,
    index_head_dim=16,
    index_topk=16,
    hc_mult=2,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65_536),
)

EASY = Difficulty(
    min_document_tokens=60,
    max_document_tokens=120,
    max_sample_tokens=1280,
    tool_share=0.4,
    chat_share=0.05,
    copy_share=0.2,
)
HARD = Difficulty(
    min_document_tokens=60,
    max_document_tokens=1500,
    max_sample_tokens=2560,
    tool_share=0.25,
)


def small_model(config: ModelConfig = SMALL, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(NANO)
