"""Generated token ids to the wire objects of an answer, whole or streamed.

``deepseek-recipe``'s stream processor separates reasoning, answer text and DSML tool calls, cuts
at stop strings and counts; this module drives it for Chat Completions, Messages and Responses.
The answer does not depend on how its ids were split into calls. Nothing here waits or knows HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import deepseek_recipe as recipe

from rorqual.protocol.render import RenderedRequest
from rorqual.protocol.tokenizer import Tokenizer

Protocol = Literal["chat", "messages", "responses"]

TokenAlternatives = tuple[float, Sequence[tuple[int, float]]]
"""A token's natural-log probability, and (id, log-probability) of the most likely ones."""

_LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot


class Event(NamedTuple):
    """One server-sent event of a streamed answer."""

    name: str | None
    """None for an unnamed event."""
    data: str
    """JSON text, or the protocol's end mark."""


class _Wire(NamedTuple):
    """deepseek-recipe's classes for one protocol; they share their methods, not a base class."""

    request: Any
    response: Any


_WIRES: Mapping[Protocol, _Wire] = MappingProxyType(
    {
        "chat": _Wire(recipe.ChatCompletionRequest, recipe.ChatCompletionResponse),
        "messages": _Wire(recipe.MessagesRequest, recipe.MessagesResponse),
        "responses": _Wire(recipe.ResponsesRequest, recipe.ResponsesResponse),
    }
)


class Answer:
    """Builds the answer to one request from its tokens. One owner; not thread-safe.

    Call ``start``, then ``push`` until ``is_complete`` or the tokens end, then ``finish``. Each
    returns the events it completed. ``whole`` gives the same as one object, if ``streamed`` was
    False; events are then not returned.
    """

    def __init__(
        self,
        request: RenderedRequest,
        tokenizer: Tokenizer,
        answer_id: str,
        *,
        streamed: bool = True,
        protocol: Protocol = "chat",
        echo: recipe.ResponsesEcho | None = None,
    ) -> None:
        """``echo``: what a Responses object repeats of its request; other protocols have none."""
        self._request = request
        self._id = answer_id
        self._streamed = streamed
        self._wire = _WIRES[protocol]
        generator = self._wire.request.chunk_generator(
            request.conversation, answer_id, request.model
        )
        self._processor = recipe.StreamProcessor(
            generator if echo is None else generator.with_echo(echo),
            request.conversation.parsing_options,
            tokenizer.stream_decoder,
        )
        self._detokenize = tokenizer.token_bytes
        self._tail = b""
        self._num_held = 0
        self._chunks: list[Any] = []
        self._cached_tokens = 0

    @property
    def is_complete(self) -> bool:
        """Whether the answer has ended, by ``finish`` or earlier at a stop string."""
        return self._processor.finished

    def start(self, cached_tokens: int = 0) -> list[Event]:
        """Open the answer. ``cached_tokens`` of the prompt were reused rather than computed."""
        self._cached_tokens = cached_tokens
        usage = recipe.PromptUsage(
            prompt_tokens=len(self._request.prompt_ids), prompt_cache_hit_tokens=cached_tokens
        )
        return self._push(recipe.InferenceChunk.ready(prompt_usage=usage))

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenAlternatives] | None = None
    ) -> list[Event]:
        """Append generated tokens; ``logprobs``, where asked for, has one entry per token.

        Tokens after the answer's end are dropped.
        """
        events: list[Event] = []
        for index, token in enumerate(token_ids):
            entry = None if logprobs is None else [_finite(logprobs[index])]
            # One at a time: the processor holds back a whole chunk that ends inside a character.
            events += self._push(recipe.InferenceChunk.tokens([token], entry))
            self._note_held(token)
        return events

    def finish(self, reason: Literal["stop", "length"]) -> list[Event]:
        """End the answer: the model stopped, or ``max_tokens`` was reached. Idempotent."""
        events: list[Event] = []
        if self._num_held:  # tokens of a character that was never completed: no text, but a count
            events += self._push(recipe.InferenceChunk.text("", self._num_held))
        reasons = recipe.InferenceFinishReason
        end = reasons.Stop if reason == "stop" else reasons.Length
        events += self._push(recipe.InferenceChunk.finish(end))
        return events + self._taken(self._processor.finish())

    def end_mark(self) -> Event | None:
        """The event after the last one, in protocols that have it."""
        data = self._wire.response.sse_done_data()
        return None if data is None else Event(None, data)

    def whole(self, created: int) -> str:
        """The complete answer as one JSON object; may be called once.

        Args:
            created: seconds since the epoch.
        """
        assert not self._streamed, "a streamed answer has already been handed out"
        assert self.is_complete, "the answer has not ended"
        prompt_tokens = len(self._request.prompt_ids)
        response = self._wire.response(
            self._id, self._request.model, created, prompt_tokens, self._cached_tokens
        )
        for chunk in self._chunks:
            response.accumulate(chunk)
        return str(response.to_json())

    def _note_held(self, token: int) -> None:
        """Count the tokens the processor holds back: those since text last ended in a character."""
        # A character has at most 4 bytes, so its last 4 say whether the text so far is whole.
        self._tail = (self._tail + self._detokenize(token))[-4:]
        is_whole = not self._tail.decode("utf-8", "replace").endswith("\N{REPLACEMENT CHARACTER}")
        self._num_held = 0 if is_whole else self._num_held + 1

    def _push(self, chunk: recipe.InferenceChunk) -> list[Event]:
        return [] if self.is_complete else self._taken(self._processor.push(chunk))

    def _taken(self, chunks: Sequence[Any]) -> list[Event]:
        if not self._streamed:
            self._chunks += chunks
            return []
        name = self._wire.response.sse_event_name
        return [Event(name(chunk), chunk.to_json()) for chunk in chunks]


def _finite(entry: TokenAlternatives) -> TokenAlternatives:
    drawn, top = entry
    return max(drawn, _LOWEST_LOGPROB), [(token, max(p, _LOWEST_LOGPROB)) for token, p in top]
