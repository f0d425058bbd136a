"""A tiny random checkpoint on disk, and sessions whose model says what the test wants."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from scripted_sessions import ScriptedSession, scripted_session

from rorqual.model.checkpoint import save_model
from rorqual.model.config import TINY
from rorqual.model.transformer import Transformer
from rorqual.protocol.modes import ModelCard, SamplingDefaults
from rorqual.protocol.tokenizer import Tokenizer

TOKENIZER_DIR = Path(__file__).parents[2] / "models" / "nano-flash"
CONFIG = TINY.replace(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_lora_rank=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_hash_layers=1,
    compress_ratios=(0, 4, 0),
    index_head_dim=16,
)
CARD = ModelCard(
    name="tiny",
    generation="preview",
    context_length=2048,
    default_mode="non-think",
    default_max_tokens=600,
    sampling=SamplingDefaults(temperature=0.0),
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(TOKENIZER_DIR)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights that loads in milliseconds."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, path)
    shutil.copy(TOKENIZER_DIR / "tokenizer.json", path)
    card = {
        "name": CARD.name,
        "generation": CARD.generation,
        "context_length": CARD.context_length,
        "default_mode": CARD.default_mode,
        "default_max_tokens": CARD.default_max_tokens,
        "sampling": {"temperature": 0.0},
    }
    (path / "card.json").write_text(json.dumps(card), "utf-8")
    return path


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> ScriptedSession:
    """Opens sessions whose model gives the listed answers; see ``scripted_session``."""
    return functools.partial(scripted_session, tokenizer, CARD)
