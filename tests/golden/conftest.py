"""Renderers for the two models the vectors were made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.protocol.modes import Generation, ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import SYSTEM, Tokenizer

NANO = Path(__file__).parents[2] / "models" / "nano-flash" / "tokenizer.json"
GENERATIONS: dict[str, Generation] = {"DeepSeek-V4-Pro": "ga", "DeepSeek-V4.1-Flash": "v4.1"}


@pytest.fixture(scope="session")
def golden_tokenizer() -> Tokenizer:
    """The nano vocabulary plus V4.1's system token."""
    raw = json.loads(NANO.read_text("utf-8"))
    last = raw["added_tokens"][-1]
    raw["added_tokens"].append({**last, "id": last["id"] + 1, "content": SYSTEM})
    return Tokenizer(raw)


@pytest.fixture(scope="session")
def renderer_of(golden_tokenizer: Tokenizer) -> Callable[[str], Renderer]:
    """Renderer by the vectors' model name, as the hosted API is configured."""
    renderers = {
        name: Renderer(
            ModelCard(name=name, generation=generation, context_length=1_048_576),
            golden_tokenizer,
        )
        for name, generation in GENERATIONS.items()
    }
    return renderers.__getitem__
