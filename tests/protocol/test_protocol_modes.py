"""Modes mean the right prompt on every generation; cards are checked."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import ConfigError, RequestError
from rorqual.protocol.modes import (
    EFFORTS,
    MODES,
    Generation,
    Mode,
    ModelCard,
    level_of_mode,
    request_fields,
)
from rorqual.protocol.render import DEFAULT_MAX_TOKENS, Renderer
from rorqual.protocol.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
ABSOLUTE_MAXIMUM = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"
BEYOND_MAXIMUM = "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"
NO_TEXT = hashlib.sha256(b"").hexdigest()


def renderer_for(generation: Generation, default: Mode, tokenizer: Tokenizer) -> Renderer:
    card = ModelCard(
        name="m", generation=generation, context_length=1_048_576, default_mode=default
    )
    return Renderer(card, tokenizer)


def effort_text(prompt: str) -> str:
    """Digest of what stands between BOS and the first turn."""
    text = prompt.removeprefix("<｜begin▁of▁sentence｜>").split("<｜User｜>")[0]
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("generation", "mode", "ending", "text"),
    [
        ("preview", "non-think", "</think>", NO_TEXT),
        ("preview", "think", "<think>", NO_TEXT),
        ("preview", "think-max", "<think>", ABSOLUTE_MAXIMUM),
        ("ga", "non-think", "</think>", NO_TEXT),
        ("ga", "think", "<think>", ABSOLUTE_MAXIMUM),
        ("ga", "think-max", "<think>", BEYOND_MAXIMUM),
    ],
)
def test_mode_renders_its_generations_prefix(
    generation: Generation, mode: Mode, ending: str, text: str, tokenizer: Tokenizer
) -> None:
    renderer = renderer_for(generation, "think", tokenizer)
    request = renderer.render({"model": "m", "messages": HI, **request_fields(mode)})
    assert request.mode == mode
    assert request.prompt.endswith(f"<｜Assistant｜>{ending}")
    assert effort_text(request.prompt) == text
    assert request.sampling.max_tokens == DEFAULT_MAX_TOKENS[mode]
    by_default = renderer_for(generation, mode, tokenizer).render({"model": "m", "messages": HI})
    assert by_default.prompt == request.prompt
    assert by_default.mode == mode


@pytest.mark.parametrize(
    ("generation", "effort", "mode", "text"),
    [
        ("preview", "low", "think", NO_TEXT),
        ("preview", "high", "think", NO_TEXT),
        ("preview", "xhigh", "think-max", ABSOLUTE_MAXIMUM),
        ("preview", "ultra", "think-max", ABSOLUTE_MAXIMUM),
        ("ga", "low", "think", NO_TEXT),
        ("ga", "high", "think", ABSOLUTE_MAXIMUM),
        ("ga", "xhigh", "think", ABSOLUTE_MAXIMUM),
        ("ga", "ultra", "think-max", BEYOND_MAXIMUM),
    ],
)
def test_effort_word_means_what_its_generation_trained(
    generation: Generation, effort: str, mode: Mode, text: str, tokenizer: Tokenizer
) -> None:
    renderer = renderer_for(generation, "non-think", tokenizer)
    request = renderer.render({"model": "m", "messages": HI, "reasoning_effort": effort})
    assert request.mode == mode
    assert effort_text(request.prompt) == text


@pytest.mark.parametrize("generation", ["preview", "ga"])
@pytest.mark.parametrize("default", MODES)
def test_reported_mode_always_agrees_with_the_prompt(
    generation: Generation, default: Mode, tokenizer: Tokenizer
) -> None:
    renderer = renderer_for(generation, default, tokenizer)
    thinkings: list[Any] = [None, *({"type": t} for t in ("enabled", "disabled", "adaptive"))]
    for thinking, effort in itertools.product(thinkings, [None, *EFFORTS[generation]]):
        body = {"model": "m", "messages": HI, "thinking": thinking, "reasoning_effort": effort}
        if thinking and effort and (thinking["type"] == "disabled") != (effort == "none"):
            with pytest.raises(RequestError, match="asks for thinking and"):
                renderer.render(body)
            continue
        request = renderer.render(body)
        assert request.prompt.endswith("</think>") == (request.mode == "non-think"), body
        if request.mode == "think-max":
            level = level_of_mode(generation, "think-max")
            asked = renderer.render({**body, "thinking": None, "reasoning_effort": "max"})
            assert level.mode == "think-max"
            assert request.prompt == asked.prompt, body


def test_every_generation_knows_the_apis_eight_words() -> None:
    words = {"none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"}
    assert all(set(levels) == words for levels in EFFORTS.values())
    for levels in EFFORTS.values():
        assert {level.mode for level in levels.values()} == set(MODES)


def test_nano_card_loads(nano_card: ModelCard) -> None:
    assert nano_card.name == "nano-flash"
    assert nano_card.generation == "preview"
    assert nano_card.sampling is not None
    assert nano_card.sampling.temperature == 0


GOOD = {"name": "m", "generation": "ga", "context_length": 100}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": ""}, "name"),
        ({"name": 5}, r"\$\.name"),
        ({"generation": "gb"}, r"\$\.generation"),
        ({"context_length": 1}, "context_length"),
        ({"context_length": "8k"}, r"\$\.context_length"),
        ({"default_mode": "high"}, r"\$\.default_mode"),
        ({"default_max_tokens": 0}, "default_max_tokens"),
        ({"sampling": {"temperature": 3}}, "temperature"),
        ({"sampling": {"top_p": 0}}, "top_p"),
        ({"sampling": {"top_k": 3}}, "top_k"),
        ({"aliases": [""]}, "aliases"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_wrong_card_is_refused_by_file_and_field(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps(GOOD))
    assert ModelCard.from_dir(tmp_path).name == "m"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ConfigError, match=complaint) as caught:
        ModelCard.from_dir(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_unreadable_card_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"card\.json"):
        ModelCard.from_dir(tmp_path)


def test_v41_needs_its_system_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="System"):
        renderer_for("v4.1", "think", tokenizer)
