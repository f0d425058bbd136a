"""One loaded model and the way from a Chat Completions body to a streamed reply, in process.

The same path a served request takes (render, engine, parse), without HTTP.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.engine import Engine
from rorqual.engine.handle import Handle
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.parse import Answer, Event
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.answering import engine_request, failure_in, feed

_CANCEL_TIMEOUT_S = 120.0
"""A cancelled request ends with the step it is in; a long prompt chunk can take a while."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A finished tool call."""

    call_id: str
    name: str
    arguments: str
    """JSON text as the model wrote it; may be invalid."""

    def to_wire(self) -> dict[str, Any]:
        """The entry of an assistant message's ``tool_calls``."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to a reply; empty where it added nothing of the kind."""

    reasoning: str = ""
    content: str = ""
    started_call: str = ""
    """Name of a tool call that begins here."""


@dataclass(kw_only=True)
class _Call:
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class Reply:
    """A reply being generated. Iterate it once for its deltas; then its fields are complete."""

    def __init__(self, handle: Handle, answer: Answer) -> None:
        self._handle = handle
        self._answer = answer
        self._calls: dict[int, _Call] = {}
        self.reasoning = ""
        self.content = ""
        self.finish_reason: str | None = None
        """The wire's: ``stop``, ``length``, ``tool_calls``; None if cancelled."""
        self.usage: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come.

        Raises:
            EngineError: the model failed.
        """
        for events in answer_events(self._handle, self._answer):
            yield from self._deltas(events)

    def cancel(self) -> None:
        """Stop generating and wait until the engine has freed the request."""
        self._handle.cancel()
        self._handle.result(_CANCEL_TIMEOUT_S)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far, in order."""
        return tuple(
            ToolCall(call_id=c.call_id, name=c.name, arguments=c.arguments)
            for _, c in sorted(self._calls.items())
        )

    def message(self) -> dict[str, Any]:
        """The assistant message to append to the conversation; calls only if they are whole."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.finish_reason == "tool_calls":
            message["tool_calls"] = [call.to_wire() for call in self.tool_calls]
        return message

    def _deltas(self, events: list[Event]) -> Iterator[Delta]:
        for event in events:
            chunk = json.loads(event.data)
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                delta = choice["delta"]
                reasoning, content = delta.get("reasoning_content"), delta.get("content")
                self.reasoning += reasoning or ""
                self.content += content or ""
                if reasoning or content:
                    yield Delta(reasoning=reasoning or "", content=content or "")
                for piece in delta.get("tool_calls") or ():
                    call = self._calls.setdefault(piece["index"], _Call())
                    function = piece["function"]
                    call.arguments += function.get("arguments") or ""
                    if "id" in piece:
                        call.call_id, call.name = piece["id"], function["name"]
                        yield Delta(started_call=call.name)


@dataclass(kw_only=True)
class Session:
    """A loaded model. Made by ``loading.open_session``."""

    card: ModelCard
    tokenizer: Tokenizer
    renderer: Renderer
    engine: Engine
    device: str = "cpu"
    """Where the model is."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer."""
        return self.renderer.context_tokens

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Start generating the reply to a streaming Chat Completions body.

        Raises:
            RequestError: the body is wrong or too long.
        """
        rendered = self.renderer.render({**body, "model": self.card.name, "stream": True})
        name = self._name()
        return Reply(self._submit(rendered, name), Answer(rendered, self.tokenizer, name))

    def complete(self, body: Mapping[str, Any], created: int) -> str:
        """The whole reply as a Chat Completions JSON object.

        Args:
            created: seconds since the epoch, for the object's field of that name.

        Raises:
            RequestError: the body is wrong or too long.
            EngineError: the model failed.
        """
        rendered = self.renderer.render({**body, "model": self.card.name, "stream": False})
        name = self._name()
        answer = Answer(rendered, self.tokenizer, name, streamed=False)
        for _ in answer_events(self._submit(rendered, name), answer):
            pass
        return answer.whole(created)

    def _submit(self, rendered: RenderedRequest, name: str) -> Handle:
        return self.engine.submit(
            engine_request(rendered, self.tokenizer, name, generation=self.card.generation)
        )

    def _name(self) -> str:
        return f"chatcmpl-local-{next(self._numbers)}"


def answer_events(handle: Handle, answer: Answer) -> Iterator[list[Event]]:
    """Feed the engine's outputs to ``answer``; its events, in groups as they come.

    Raises:
        EngineError: the model failed.
    """
    for number, output in enumerate(handle):
        yield feed(answer, output, is_first=number == 0)
        if answer.is_complete:
            handle.cancel()
            return
        if error := failure_in(answer, output, handle.request.request_id):
            raise error
