"""A tiny random checkpoint on disk, and sessions whose model says what the test wants."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from scripted_sessions import CARD, CONFIG, ScriptedSession, scripted_session

from rorqual.model.checkpoint import save_model
from rorqual.model.transformer import Transformer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.testing.weights import random_state

TOKENIZER_DIR = Path(__file__).parents[2] / "models" / "nano-flash"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(TOKENIZER_DIR)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A checkpoint that loads in milliseconds: random, but its likeliest tokens are letters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    state = random_state(CONFIG, seed=0)
    for token in range(CONFIG.vocab_size):
        if not tokenizer.token_bytes(token).isalpha():
            state["head.weight"][token] = 0.0
    model = Transformer(CONFIG)
    model.load_state_dict(state)
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
