"""The event sequences and final objects of the three protocols are the official package's."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import deepseek_recipe as recipe
import pytest
from golden_vectors import vectors
from test_golden_streams import completion_ids

from rorqual.protocol.parse import Answer, Event, Protocol
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import Tokenizer

GOLDEN = vectors("golden_protocols")
TEXTS = {
    "chat": GOLDEN["model_text"],
    "messages": GOLDEN["model_text"],
    "responses": GOLDEN["model_text"],
    "chat_length": "only thinking",
}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": PARAMETERS},
}
ECHOED = recipe.ResponsesRequest(
    {
        "model": "m",
        "input": "Hi",
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": PARAMETERS}],
    }
)
OUTPUT_COUNTS = {"completion_tokens", "output_tokens", "total_tokens", "reasoning_tokens"}
UNTIMED = {"created", "created_at", "completed_at"}


@pytest.fixture
def request_of(renderer_of: Callable[[str], Renderer]) -> RenderedRequest:
    """A request with a prompt of 20 tokens, as the vectors were made with."""
    body = {
        "model": "DeepSeek-V4-Pro",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [TOOL],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    rendered = renderer_of("DeepSeek-V4-Pro").render(body)
    return dataclasses.replace(rendered, model="m", prompt_ids=tuple(range(20)))


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("name", list(GOLDEN["protocols"]))
def test_protocol_events_and_final_object(
    name: str, size: int, request_of: RenderedRequest, golden_tokenizer: Tokenizer
) -> None:
    golden = GOLDEN["protocols"][name]
    protocol: Protocol = name.removesuffix("_length")  # type: ignore[assignment]
    ids = completion_ids(golden_tokenizer, TEXTS[name])
    echo = ECHOED.echo() if protocol == "responses" else None
    streamed = Answer(request_of, golden_tokenizer, "id-1", protocol=protocol, echo=echo)
    whole = Answer(
        request_of, golden_tokenizer, "id-1", streamed=False, protocol=protocol, echo=echo
    )
    events = streamed.start(cached_tokens=8)
    whole.start(cached_tokens=8)
    for at in range(0, len(ids), size):
        events += streamed.push(ids[at : at + size])
        whole.push(ids[at : at + size])
    reason = "length" if name.endswith("_length") else "stop"
    events += streamed.finish(reason)
    whole.finish(reason)

    expected = [Event(e["event"], json.dumps(e["data"])) for e in golden["events"]]
    assert merged(events) == merged(expected)
    assert settled(json.loads(whole.whole(created=1))) == settled(golden["final"])
    end = streamed.end_mark()
    assert (end and end.data) == golden["done"]
    assert str(len(ids)) in re.findall(r'(?:completion|output)_tokens":(\d+)', str(events))


def merged(events: list[Event]) -> list[Any]:
    """Events with neighbouring pieces of one text joined, and what varies between runs settled."""
    out: list[list[Any]] = []
    for event in events:
        data = settled(json.loads(event.data))
        text = take_text(data)
        if text and out and out[-1][0:2] == [event.name, data] and out[-1][2]:
            out[-1][2] += text
        else:
            out.append([event.name, data, text])
    return out


def take_text(data: dict[str, Any]) -> str:
    """Remove and return the piece of streamed text in an event."""
    holder: dict[str, Any] = data
    keys = ["delta"]
    if "choices" in data:
        holder = data["choices"][0]["delta"]
        keys = ["reasoning_content", "content"]
        if holder.get("tool_calls"):
            holder, keys = holder["tool_calls"][0]["function"], ["arguments"]
    elif data.get("type") == "content_block_delta":
        holder, keys = data["delta"], ["thinking", "text", "partial_json"]
    for key in keys:
        if isinstance(holder.get(key), str) and holder[key]:
            text: str = holder[key]
            holder[key] = "..."
            return text
    return ""


def settled(value: Any) -> Any:
    """Without times, random call ids, event numbers and counts of generated tokens."""
    value = copy.deepcopy(value)
    if isinstance(value, dict):
        if value.get("usage", 0) is None:
            del value["usage"]  # present or not by stream_options.include_usage
        value.pop("completion_tokens_details", None)
        return {
            key: settled(item)
            for key, item in value.items()
            if key not in OUTPUT_COUNTS | UNTIMED | {"sequence_number"}
        }
    if isinstance(value, list):
        return [settled(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"call_(\d\d)_\w+", r"call_\1", value)
    return value


def test_responses_events_are_numbered_without_gaps(
    request_of: RenderedRequest, golden_tokenizer: Tokenizer
) -> None:
    answer = Answer(request_of, golden_tokenizer, "id-1", protocol="responses")
    ids = completion_ids(golden_tokenizer, GOLDEN["model_text"])
    events = answer.start() + answer.push(ids) + answer.finish("stop")
    numbers = [json.loads(event.data)["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))
