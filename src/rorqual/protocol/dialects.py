"""What sets the three protocols' request bodies apart.

Field names, deepseek-recipe's classes, and the few things its conversion refuses, loses or does
not know that clients do send. Everything both sides agree on is in ``protocol/render.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import deepseek_recipe as recipe

from rorqual.errors import RequestError
from rorqual.protocol.modes import Level

Protocol = Literal["chat", "messages", "responses"]


class Dialect(NamedTuple):
    """One protocol as deepseek-recipe and its clients know it."""

    request: Any
    response: Any
    """deepseek-recipe's classes; they share their methods, not a base class."""
    smallest: Mapping[str, Any]
    """A smallest body of the right shape."""
    history: str
    """The field that holds the conversation."""
    limit_names: tuple[str, ...]
    """Names of the answer's length limit, deepseek-recipe's own first."""


DIALECTS: Mapping[Protocol, Dialect] = MappingProxyType(
    {
        "chat": Dialect(
            recipe.ChatCompletionRequest,
            recipe.ChatCompletionResponse,
            {"model": "", "messages": []},
            "messages",
            ("max_tokens", "max_completion_tokens"),
        ),
        "messages": Dialect(
            recipe.MessagesRequest,
            recipe.MessagesResponse,
            {"model": "", "messages": []},
            "messages",
            ("max_tokens",),
        ),
        "responses": Dialect(
            recipe.ResponsesRequest,
            recipe.ResponsesResponse,
            {"model": "", "input": []},
            "input",
            ("max_output_tokens",),
        ),
    }
)


def limit_name(protocol: Protocol, fields: Mapping[str, Any]) -> str:
    """Which of its names the client gave the answer's length limit."""
    names = DIALECTS[protocol].limit_names
    return next((name for name in names if fields.get(name) is not None), names[0])


def adapted(protocol: Protocol, fields: Mapping[str, Any], level: Level | None) -> dict[str, Any]:
    """The body in deepseek-recipe's terms, asking for ``level``; ``fields`` is not changed.

    Raises:
        RequestError: it wants something that would be lost without a word.
    """
    body = dict(fields)
    name, limit = DIALECTS[protocol].limit_names[0], limit_name(protocol, fields)
    if limit != name:
        body[name] = fields[limit]
    if protocol == "messages":
        _resolve_tool_changes(body)
        for field, simplified in (("messages", _known_blocks), ("tools", _untyped)):
            if field in body:
                body[field] = simplified(body[field])
    elif protocol == "responses":
        _refuse_stored_state(body)
    return body if level is None else _asking_for(level, protocol, body)


def _asking_for(level: Level, protocol: Protocol, body: dict[str, Any]) -> dict[str, Any]:
    thinks = level.prompt_effort is not None
    if protocol == "responses":
        effort = level.prompt_effort or "none"
        body["reasoning"] = {**(body.get("reasoning") or {}), "effort": effort}
        return body
    body["thinking"] = {"type": "enabled" if thinks else "disabled"}
    if protocol == "messages":
        output = dict(body.get("output_config") or {})
        output["effort"] = level.prompt_effort
        body["output_config"] = output
    else:
        body["reasoning_effort"] = level.prompt_effort
    return body


def _resolve_tool_changes(body: dict[str, Any]) -> None:
    """Declare the tools that messages define on the way, and put removals in words.

    A removed tool stays declared, so that the prompt up to its removal remains the one already
    read. deepseek-recipe knows additions by name only.
    """
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not isinstance(tools, list):
        return
    added: dict[str, Any] = {}

    def resolved(block: Any) -> Any:
        tool = block.get("tool") if isinstance(block, dict) else None
        if not isinstance(tool, dict):
            return block
        if block.get("type") == "tool_removal":
            return {"type": "text", "text": f"The tool {tool.get('name')} is no longer available."}
        definition = tool.get("definition")
        if block.get("type") != "tool_addition" or not isinstance(definition, dict):
            return block
        added[str(definition.get("name"))] = definition
        text = f"The tool {definition.get('name')} is available now."
        return {"type": "text", "text": text}

    body["messages"] = [
        {**message, "content": [resolved(block) for block in message["content"]]}
        if isinstance(message, dict)
        and message.get("role") == "system"
        and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    if added:
        others = [t for t in tools if not (isinstance(t, dict) and str(t.get("name")) in added)]
        body["tools"] = [*others, *added.values()]


def _known_blocks(messages: Any) -> Any:
    """Without reasoning that another provider encrypted: no other model can read it."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [b for b in message["content"] if not _is_redacted(b)]}
        if isinstance(message, dict)
        and isinstance(message.get("content"), list)
        and any(map(_is_redacted, message["content"]))
        else message
        for message in messages
    ]


def _is_redacted(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "redacted_thinking"


def _untyped(tools: Any) -> Any:
    """``{"type": "custom"}`` is the long way to say nothing, but not to deepseek-recipe."""
    if not isinstance(tools, list):
        return tools
    return [
        {key: value for key, value in tool.items() if key != "type"}
        if isinstance(tool, dict) and tool.get("type") == "custom"
        else tool
        for tool in tools
    ]


def _refuse_stored_state(body: Mapping[str, Any]) -> None:
    for name in ("previous_response_id", "conversation"):
        if body.get(name) is not None:
            raise RequestError(
                f"{name} is not supported: responses are not stored; send the whole conversation "
                "as input",
                param=name,
            )
    if body.get("background"):
        raise RequestError("background responses are not supported", param="background")
    items = body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict) and item.get("type") == "item_reference":
            raise RequestError(
                "item_reference is not supported: responses are not stored; send the item itself",
                param=f"input[{index}]",
            )
