"""Answers chat requests in process as the server would: rendered, generated, parsed.

What a client of ``/v1/chat/completions`` sees with temperature 0, without HTTP or an engine, so
that evaluation measures the whole path from messages to parsed tool calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.model.transformer import Transformer
from rorqual.protocol.modes import Mode, ModelCard, request_fields
from rorqual.protocol.parse import Answer
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.exam import Message
from rorqual.train.generate import Decoder


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer as a client gets it, with the text the model wrote."""

    message: Message
    """The assistant message, to be appended to the conversation as it is."""
    finish_reason: str
    raw: str
    """All generated text, reasoning and tool-call markup included."""
    num_tokens: int

    @property
    def content(self) -> str:
        """The visible answer; empty where there is none."""
        return self.message.get("content") or ""


class ChatModel:
    """A model behind its prompt format. One owner; ``decoder`` may be told what to remember."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, card: ModelCard, *, batch: int = 48
    ) -> None:
        self._tokenizer = tokenizer
        self._card = card
        self._renderer = Renderer(card, tokenizer)
        self.decoder = Decoder(model, stop_id=tokenizer.eos_id, batch=batch)

    def render(
        self,
        messages: Sequence[Message],
        mode: Mode,
        *,
        max_tokens: int,
        tools: Sequence[dict[str, Any]] = (),
    ) -> RenderedRequest:
        """The request a client would send, rendered. ``tools`` are function objects."""
        body: dict[str, Any] = {
            "model": self._card.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            **request_fields(mode),
        }
        if tools:
            body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        return self._renderer.render(body)

    def reply(
        self, requests: Sequence[RenderedRequest], *, on_done: Callable[[], None] = lambda: None
    ) -> list[Reply]:
        """Answer all ``requests``, which share one ``max_tokens``; ``on_done`` after each."""
        if not requests:
            return []
        answers = self.decoder.generate(
            [request.prompt_ids for request in requests],
            max_tokens=requests[0].sampling.max_tokens,
            on_done=on_done,
        )
        return [
            parse_reply(self._tokenizer, request, answer.ids, stopped=answer.stopped)
            for request, answer in zip(requests, answers, strict=True)
        ]


def parse_reply(
    tokenizer: Tokenizer, request: RenderedRequest, ids: Sequence[int], *, stopped: bool
) -> Reply:
    """What a client gets for the generated ``ids``, stop token excluded."""
    answer = Answer(request, tokenizer, "evaluation", streamed=False)
    answer.start()
    answer.push(ids)
    answer.finish("stop" if stopped else "length")
    choice = json.loads(answer.whole(created=0))["choices"][0]
    return Reply(
        message=choice["message"],
        finish_reason=choice["finish_reason"],
        raw=tokenizer.decode(ids),
        num_tokens=len(ids),
    )
