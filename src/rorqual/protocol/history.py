"""Generated turns, found again in the conversation a client sends back.

Clients drop the reasoning of earlier turns, re-serialise the arguments of tool calls, and see text
where the model wrote tokens. A prompt rendered from what they send back therefore differs from
what the model read and wrote, and a cache of that prefix misses. Given a memory of turns, this
module puts back what is missing and replaces each recognised turn by its own tokens. Pure
functions; the memory itself is ``server/history.py``.

A turn is recognised by the id of its first tool call, or by everything said before it; either way
only if the client's text and calls still mean what was generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import deepseek_recipe as recipe

from rorqual.protocol.tokenizer import ASSISTANT, EOS, THINK_END, THINK_START, Tokenizer


class Call(NamedTuple):
    """A tool call as the client saw it."""

    call_id: str
    name: str
    arguments: str
    """JSON text, valid or not."""


class Turn(NamedTuple):
    """One generated assistant turn."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]
    thinks: bool
    """Whether it was generated after ``<think>``."""
    ids: tuple[int, ...]
    """Its tokens as generated, without the end-of-turn token; empty if the turn was cut."""


class Memory(Protocol):
    """Where turns are kept."""

    def find(self, keys: Sequence[str], /) -> Turn | None:
        """The turn remembered under the first of ``keys`` that has one."""


class Recalled(NamedTuple):
    """A conversation with what memory added."""

    conversation: recipe.Conversation
    turns: Mapping[int, Turn]
    """Recognised turns whose tokens may be used, by position among the assistant messages."""
    digest: str
    """Of everything said; with a turn's text it makes the turn's key."""


class Span(NamedTuple):
    """Part of a rendered prompt: text with its template ranges, or tokens that replace it."""

    start: int
    end: int
    ids: tuple[int, ...]


def turn_keys(digest: str, content: str, calls: Sequence[Call]) -> list[str]:
    """Under which a turn said after ``digest`` is remembered, the most reliable first."""
    keys = [f"call:{calls[0].call_id}"] if calls else []
    return [*keys, f"turn:{_said(digest, 'assistant', content, calls)}"]


def recall(conversation: recipe.Conversation, memory: Memory) -> Recalled:
    """Fill in what ``memory`` knows of the conversation's assistant messages."""
    digest = ""
    messages: list[recipe.Message] = []
    turns: dict[int, Turn] = {}
    num_assistant, has_changed = 0, False
    thinks = conversation.thinking_mode  # else reasoning is not shown, whoever knows it
    for message in conversation.messages:
        if message.role in ("user", "tool"):
            digest = _said(digest, message.role, message.content, ())
        elif message.role == "assistant":
            calls = [Call(c.id, c.name, c.arguments) for c in message.tool_calls or ()]
            turn = memory.find(turn_keys(digest, message.content, calls))
            if turn and not message.prefix and _is_same(turn, message.content, calls):
                if thinks and turn.reasoning and not message.reasoning_content:
                    has_changed = True
                    message = recipe.AssistantMessage(
                        message.content, turn.reasoning, message.tool_calls
                    )
                reasoning = (message.reasoning_content or "").strip()
                if not thinks or reasoning == turn.reasoning.strip():
                    turns[num_assistant] = turn
            num_assistant += 1
            digest = _said(digest, "assistant", message.content, calls)
        messages.append(message)
    if has_changed:
        conversation = replaced(conversation, messages)
    return Recalled(conversation, turns, digest)


def replaced(
    conversation: recipe.Conversation,
    messages: Sequence[recipe.Message] | None = None,
    response_schema: Any = None,
) -> recipe.Conversation:
    """A copy of ``conversation`` with other messages or a schema for its answer."""
    schema = conversation.response_schema if response_schema is None else response_schema
    is_object = conversation.response_format == "json_object" and schema is None
    return recipe.Conversation(
        conversation.messages if messages is None else messages,
        thinking_mode=conversation.thinking_mode,
        tools=conversation.tools,
        tool_choice=conversation.tool_choice,
        reasoning_effort=conversation.reasoning_effort,
        response_format="json_object" if is_object else "text",
        response_schema=schema,
        response_regex=conversation.response_regex if schema is None else None,
    )


def generated_spans(
    prompt: str,
    special_ranges: Sequence[tuple[int, int]],
    num_assistant: int,
    turns: Mapping[int, Turn],
    tokenizer: Tokenizer,
) -> list[Span]:
    """The parts of ``prompt`` that the tokens of ``turns`` stand for.

    Args:
        num_assistant: assistant messages of the conversation. If the layout shows another number
            of turns than these and the one to come, nothing is replaced.
    """
    marks = [(start, end, prompt[start:end]) for start, end in special_ranges]
    opened = [at for at, mark in enumerate(marks) if mark[2] == ASSISTANT]
    if len(opened) not in (num_assistant, num_assistant + 1):
        return []
    spans = []
    for position, turn in turns.items():
        at = opened[position]
        ends = [mark for mark in marks[at : at + 4 * len(turn.ids) + 8] if mark[2] == EOS]
        inner = marks[at + 1 : at + 3]
        if not (turn.ids and ends and inner):
            continue
        opens_thinking = inner[0][2] == THINK_START
        if opens_thinking and turn.thinks:
            spans.append(Span(inner[0][1], ends[0][0], turn.ids))
            continue
        closing = inner[-1] if opens_thinking else inner[0]
        if closing[2] == THINK_END and closing[1] <= ends[0][0]:
            spans.append(Span(closing[1], ends[0][0], _visible(turn, tokenizer)))
    return spans


def _visible(turn: Turn, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The turn's tokens after its reasoning."""
    if not turn.thinks:
        return turn.ids
    return turn.ids[turn.ids.index(tokenizer.think_end_id) + 1 :]


def _said(digest: str, role: str, content: str, calls: Sequence[Call]) -> str:
    # Blank edges are left out: some clients trim what they send back.
    said = [digest, role, content.strip(), *((c.name, _meaning(c.arguments)) for c in calls)]
    text = json.dumps(said, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_same(turn: Turn, content: str, calls: Sequence[Call]) -> bool:
    return turn.content.strip() == content.strip() and [
        (call.name, _meaning(call.arguments)) for call in turn.calls
    ] == [(call.name, _meaning(call.arguments)) for call in calls]


def _meaning(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
