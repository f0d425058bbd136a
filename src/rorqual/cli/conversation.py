"""The state of a chat: messages, attached documents, mode and tool calls that await results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

from rorqual.cli.options import with_document
from rorqual.cli.session import Reply, Session, ToolCall
from rorqual.errors import ConfigError
from rorqual.protocol.modes import Mode, request_fields


class Conversation:
    """What has been said. A failed exchange leaves it as it was before."""

    def __init__(
        self,
        session: Session,
        *,
        mode: Mode,
        system: str | None,
        tools: list[dict[str, Any]],
        fields: dict[str, Any],
    ) -> None:
        """``fields`` are sent with every request, such as ``temperature``."""
        self.session = session
        self.mode: Mode = mode
        self.tools = tools
        self.num_tokens = 0
        """Prompt and answer of the last exchange."""
        self._system = system
        self._fields = fields
        self.messages: list[dict[str, Any]] = []
        """In the wire's form, without the system message."""
        self.documents: list[str] = []
        """What goes into the next message."""
        self._pending: list[ToolCall] = []
        self._results: list[dict[str, Any]] = []

    @property
    def awaits_result(self) -> bool:
        """Whether the model waits for a tool's result."""
        return bool(self._pending)

    def label(self) -> str:
        """What to ask the user for."""
        return f"result of {self._pending[0].name}> " if self._pending else "> "

    def set_mode(self, name: str) -> None:
        """Switch the reasoning mode from the next message on. Raises ConfigError."""
        for mode in get_args(Mode):
            if name == mode:
                self.mode = mode
                return
        raise ConfigError(f"no mode {name!r}; modes: {', '.join(get_args(Mode))}")

    def attach(self, document: str) -> None:
        """Put ``document`` into the next message."""
        self.documents.append(document)

    def reset(self) -> None:
        """Forget everything said; mode and tools stay."""
        self.messages, self.documents = [], []
        self._pending, self._results = [], []
        self.num_tokens = 0

    def say(self, text: str) -> AbstractContextManager[Reply]:
        """Send a user message; the reply is streamed inside the ``with`` block.

        Raises (on entry) RequestError: too long or malformed.
        """
        for document in reversed(self.documents):
            text = with_document(document, text)
        return self._exchange([{"role": "user", "content": text}])

    def give_result(self, text: str) -> AbstractContextManager[Reply] | None:
        """Answer the first waiting tool call; once all have results, as ``say``, else None."""
        call, *others = self._pending
        result = {"role": "tool", "tool_call_id": call.call_id, "content": text}
        results = [*self._results, result]
        if others:
            self._pending, self._results = others, results
            return None
        return self._exchange(results)

    @contextmanager
    def _exchange(self, added: list[dict[str, Any]]) -> Iterator[Reply]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self.messages, *added]
        body: dict[str, Any] = {
            "messages": system + messages,
            **self._fields,
            **request_fields(self.mode),
        }
        if self.tools:
            body["tools"] = self.tools
        reply = self.session.ask(body)
        try:
            yield reply
        except BaseException:
            reply.cancel()
            raise
        self.documents = []
        self.messages = [*messages, reply.message()]
        self._pending = list(reply.tool_calls) if reply.finish_reason == "tool_calls" else []
        self._results = []
        self.num_tokens = reply.usage.get("total_tokens", self.num_tokens)
