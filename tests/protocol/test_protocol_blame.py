"""Finding the field at fault costs little, however large the body."""

from __future__ import annotations

import time
from typing import Any

import deepseek_recipe as recipe
import pytest

from rorqual.protocol.blame import blame


def blamed(body: dict[str, Any]) -> str | None:
    with pytest.raises((ValueError, TypeError)) as caught:
        recipe.ChatCompletionRequest(body)
    return blame(body, str(caught.value))


def messages(count: int, text: str = "Hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for _ in range(count)]


@pytest.mark.parametrize("index", [0, 1, 499, 2999])
def test_one_wrong_message_among_thousands_is_found(index: int) -> None:
    body = {"model": "m", "messages": messages(3000)}
    body["messages"][index]["content"] = 7
    assert blamed(body) == f"messages[{index}].content"


def test_a_wrong_field_beside_a_long_document_is_found() -> None:
    body = {"model": "m", "messages": messages(3, "word " * 100_000)}
    body["messages"][1]["role"] = 7
    assert blamed(body) == "messages[1].role"


def test_a_body_made_to_be_slow_is_not() -> None:
    """Many parts, each beside many siblings: asking about each would cost their product."""
    parts: list[Any] = [{"type": "text", "text": "x" * 10} for _ in range(9_000)]
    body = {"model": "m", "messages": [{"role": "user", "content": [*parts, 7]}]}
    started = time.process_time()
    assert blamed(body) == "messages[0].content[9000]"
    assert time.process_time() - started < 1.5


def test_what_cannot_be_told_within_the_budget_is_left_out() -> None:
    body = {"model": "m", "messages": [messages(1), *messages(400_000), 7]}
    body["messages"][0] = {
        "role": "user",
        "content": "Hi",
        "name": {str(i): i for i in range(9999)},
    }
    started = time.process_time()
    path = blamed(body)
    assert time.process_time() - started < 4
    assert path in (None, "messages")
