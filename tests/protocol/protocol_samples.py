"""The shipped nano model's tokenizer, and a smallest request body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer

NANO = Path(__file__).parents[2] / "models" / "nano-flash"
TOKENIZER = Tokenizer.from_dir(NANO)
HI = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "m", "messages": HI}
OFF = {"thinking": {"type": "disabled"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def renderer_with(**card: Any) -> Renderer:
    """A renderer for a card with these fields; a preview model with 10,000 tokens otherwise."""
    fields = {"name": "m", "generation": "preview", "context_length": 10_000, **card}
    return Renderer(ModelCard(**fields), TOKENIZER)
