"""Completions, most of them malformed, parse to the official package's messages in any chunking."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from golden_vectors import vectors

from rorqual.protocol.parse import Answer
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer

CASES = vectors("golden_stream")["cases"]
PARAMS = [(model, name) for model, cases in CASES.items() for name in cases]
TEMPLATE = re.compile("</?think>|｜DSML｜")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def completion_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids as a model writes them: template tokens as tokens."""
    return tokenizer.encode_prompt(text, [match.span() for match in TEMPLATE.finditer(text)])


def letter_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The same with ordinary text in the smallest tokens."""
    ids: list[int] = []
    at = 0
    for match in TEMPLATE.finditer(text):
        ids += [
            token for char in text[at : match.start()] for token in tokenizer.encode_plain(char)
        ]
        ids.append(tokenizer.special_id(match[0]))
        at = match.end()
    return ids + [token for char in text[at:] for token in tokenizer.encode_plain(char)]


def summary(message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    return {
        "reasoning_content": message.get("reasoning_content"),
        "content": message["content"],
        "tool_calls": [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in calls
        ],
        "finish_reason": finish_reason,
    }


def test_the_vectors_are_all_here() -> None:
    assert len(PARAMS) == 42


@pytest.mark.parametrize("encode", [completion_ids, letter_ids])
@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize(("model", "name"), PARAMS)
def test_completion_parses_as_in_the_official_package(
    model: str,
    name: str,
    size: int,
    encode: Callable[[Tokenizer, str], list[int]],
    renderer_of: Callable[[str], Renderer],
    golden_tokenizer: Tokenizer,
) -> None:
    case = CASES[model][name]
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    if name != "tools_not_declared":
        body["tools"] = [TOOL]
    request = renderer_of(model).render(body)
    ids = encode(golden_tokenizer, case["text"])

    whole = Answer(request, golden_tokenizer, "id", streamed=False)
    streamed = Answer(request, golden_tokenizer, "id")
    assert whole.start() == []
    events = streamed.start()
    for at in range(0, len(ids), size):
        assert whole.push(ids[at : at + size]) == []
        events += streamed.push(ids[at : at + size])
    whole.finish("stop")
    events += streamed.finish("stop")

    choice = json.loads(whole.whole(created=1))["choices"][0]
    assert summary(choice["message"], choice["finish_reason"]) == case["result"]
    assert joined([json.loads(event.data) for event in events]) == case["result"]


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client puts together from streamed chunks."""
    message: dict[str, Any] = {"reasoning_content": "", "content": "", "tool_calls": []}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        for key in ("reasoning_content", "content"):
            message[key] += delta.get(key) or ""
        for call in delta.get("tool_calls") or []:
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"function": dict(call["function"])})
                assert re.fullmatch(r"call_\d\d_\w+", call["id"])
            else:
                message["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
    return summary(message, chunks[-1]["choices"][0]["finish_reason"])
