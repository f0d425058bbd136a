"""Generated token ids to the wire objects of an answer, whole or streamed.

``deepseek-recipe``'s stream processor separates reasoning, answer text and DSML tool calls, cuts
at stop strings and counts; this module drives it for Chat Completions, Messages and Responses.
The answer does not depend on how its ids were split into calls. Nothing here waits or knows HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import deepseek_recipe as recipe

from rorqual.protocol.dialects import DIALECTS, Protocol
from rorqual.protocol.history import Call, Turn
from rorqual.protocol.render import RenderedRequest
from rorqual.protocol.tokenizer import DSML, Tokenizer

TokenAlternatives = tuple[float, Sequence[tuple[int, float]]]
"""A token's natural-log probability, and (id, log-probability) of the most likely ones."""

_LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot


class Event(NamedTuple):
    """One server-sent event of a streamed answer."""

    name: str | None
    """None for an unnamed event."""
    data: str
    """JSON text, or the protocol's end mark."""


class TokenFeed:
    """Puts tokens into deepseek-recipe's stream processor; what comes out is the subclass's.

    Call ``start``, then ``push`` until ``is_complete`` or the tokens end, then ``finish``. Each
    returns the events it completed. One owner; not thread-safe.
    """

    def __init__(
        self, processor: recipe.StreamProcessor, tokenizer: Tokenizer, num_prompt_tokens: int
    ) -> None:
        self._processor = processor
        self._detokenize = tokenizer.token_bytes
        self._num_prompt_tokens = num_prompt_tokens
        self._cached_tokens = 0
        self._tail = b""
        self._num_held = 0
        self._ids: list[int] = []
        self._ending: Literal["stop", "length"] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the answer has ended, by ``finish`` or earlier at a stop string."""
        return self._processor.finished

    @property
    def stopped_after(self) -> int | None:
        """Tokens of the answer up to the stop string that ended it; None if none did."""
        return len(self._ids) if self.is_complete and self._ending is None else None

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens up to and including the one that closes the reasoning."""
        return 0

    def start(self, cached_tokens: int = 0) -> list[Event]:
        """Open the answer. ``cached_tokens`` of the prompt were reused rather than computed."""
        self._cached_tokens = cached_tokens
        usage = recipe.PromptUsage(
            prompt_tokens=self._num_prompt_tokens, prompt_cache_hit_tokens=cached_tokens
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
            if self.is_complete:
                break
            self._ids.append(token)
            entry = None if logprobs is None else [_finite(logprobs[index])]
            # One at a time: the processor holds back a whole chunk that ends inside a character.
            events += self._push(recipe.InferenceChunk.tokens([token], entry))
            self._note_held(token)
        return events

    def finish(self, reason: Literal["stop", "length"]) -> list[Event]:
        """End the answer: the model stopped, or ``max_tokens`` was reached. Idempotent."""
        events: list[Event] = []
        if not self.is_complete:
            self._ending = reason
        if self._num_held:  # tokens of a character that was never completed: no text, but a count
            events += self._push(recipe.InferenceChunk.text("", self._num_held))
        reasons = recipe.InferenceFinishReason
        end = reasons.Stop if reason == "stop" else reasons.Length
        events += self._push(recipe.InferenceChunk.finish(end))
        return events + self._taken(self._processor.finish())

    def end_mark(self) -> Event | None:
        """The event after the last one, in protocols that have it."""
        raise NotImplementedError

    def whole(self, created: int) -> str:
        """The complete answer as one JSON object.

        Args:
            created: seconds since the epoch.
        """
        raise NotImplementedError

    def _taken(self, chunks: Sequence[Any]) -> list[Event]:
        raise NotImplementedError

    def _note_held(self, token: int) -> None:
        """Count the tokens the processor holds back: those since text last ended in a character."""
        # A character has at most 4 bytes, so its last 4 say whether the text so far is whole.
        self._tail = (self._tail + self._detokenize(token))[-4:]
        is_whole = not self._tail.decode("utf-8", "replace").endswith("\N{REPLACEMENT CHARACTER}")
        self._num_held = 0 if is_whole else self._num_held + 1

    def _push(self, chunk: recipe.InferenceChunk) -> list[Event]:
        return [] if self.is_complete else self._taken(self._processor.push(chunk))


class Answer(TokenFeed):
    """Builds the answer to one conversation from its tokens.

    ``whole`` gives the same as the events in one object; where ``streamed`` is False, that is all.
    """

    def __init__(
        self,
        request: RenderedRequest,
        tokenizer: Tokenizer,
        answer_id: str,
        *,
        streamed: bool = True,
        protocol: Protocol | None = None,
        echo: recipe.ResponsesEcho | None = None,
    ) -> None:
        """``protocol`` and what a Responses object repeats of its request, ``echo``, are the
        request's unless said otherwise.
        """
        self._request = request
        self._id = answer_id
        self._streamed = streamed
        self._protocol = protocol or request.protocol
        self._wire = DIALECTS[self._protocol]
        generator = self._wire.request.chunk_generator(
            request.conversation, answer_id, request.model
        )
        if self._protocol == "responses":
            if request.extras is not None:
                echo = echo or request.extras.echo
                generator = generator.with_namespace_tool_map(dict(request.extras.namespaces))
            generator = generator if echo is None else generator.with_echo(echo)
        parsing = request.conversation.parsing_options
        stage = parsing.thinking_initial_stage
        self._thinks = stage is not None and stage.starts_in_reasoning()
        super().__init__(
            recipe.StreamProcessor(generator, parsing, tokenizer.stream_decoder),
            tokenizer,
            len(request.prompt_ids),
        )
        self._think_end_id = tokenizer.think_end_id
        self._dsml_id = tokenizer.special_id(DSML)
        self._chunks: list[Any] = []
        self._whole = ""

    def end_mark(self) -> Event | None:
        """The event after the last one, in protocols that have it."""
        data = self._wire.response.sse_done_data()
        return None if data is None else Event(None, data)

    def whole(self, created: int) -> str:
        """The complete answer as one JSON object; the first call decides.

        Args:
            created: seconds since the epoch.
        """
        if not self._whole:
            assert self.is_complete, "the answer has not ended"
            response = self._wire.response(
                self._id, self._request.model, created, self._num_prompt_tokens, self._cached_tokens
            )
            for chunk in self._chunks:
                response.accumulate(chunk)
            self._chunks.clear()
            self._whole = str(response.to_json())
        return self._whole

    @property
    def num_reasoning_tokens(self) -> int:
        """See ``TokenFeed``."""
        if not self._thinks:
            return 0
        closes = self._think_end_id in self._ids
        return self._ids.index(self._think_end_id) + 1 if closes else len(self._ids)

    def turn(self, created: int) -> Turn:
        """The finished answer as the client sees it.

        Its tokens are given only if the model ended the turn itself: a cut one is not what will
        be sent back.
        """
        read = _READERS[self._protocol]
        reasoning, content, calls = read(json.loads(self.whole(created)))
        is_whole = self._ending == "stop" and (not self._thinks or self._think_end_id in self._ids)
        ids = tuple(self._ids) if is_whole else ()
        return Turn(reasoning, content, calls, self._thinks, ids)

    def num_unread_calls(self, turn: Turn) -> int:
        """Tool calls the model began that came out as none, or with arguments that are no JSON."""
        if not self._request.tools_declared:
            return 0
        num_broken = sum(not _is_object(call.arguments) for call in turn.calls)
        return num_broken or int(not turn.calls and self._dsml_id in self._ids)

    def _taken(self, chunks: Sequence[Any]) -> list[Event]:
        self._chunks += chunks
        if not self._streamed:
            return []
        name = self._wire.response.sse_event_name
        return [Event(name(chunk), chunk.to_json()) for chunk in chunks]


def _finite(entry: TokenAlternatives) -> TokenAlternatives:
    drawn, top = entry
    return max(drawn, _LOWEST_LOGPROB), [(token, max(p, _LOWEST_LOGPROB)) for token, p in top]


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


# ---- an answer in each protocol's words --------------------------------------------------------
_Read = tuple[str, str, tuple[Call, ...]]


def _read_chat(answer: dict[str, Any]) -> _Read:
    message = answer["choices"][0]["message"]
    calls = [
        Call(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    return message.get("reasoning_content") or "", message.get("content") or "", tuple(calls)


def _read_messages(answer: dict[str, Any]) -> _Read:
    reasoning = content = ""
    calls = []
    for block in answer["content"]:
        match block["type"]:
            case "thinking":
                reasoning += block["thinking"]
            case "text":
                content += block["text"]
            case "tool_use":
                calls.append(Call(block["id"], block["name"], json.dumps(block["input"])))
    return reasoning, content, tuple(calls)


def _read_responses(answer: dict[str, Any]) -> _Read:
    reasoning = content = ""
    calls = []
    for item in answer["output"]:
        match item["type"]:
            case "reasoning":
                reasoning += "".join(part["text"] for part in item.get("content") or ())
            case "message":
                content += "".join(part.get("text", "") for part in item["content"])
            case "function_call":
                space = item.get("namespace")
                name = f"{space}__{item['name']}" if space else item["name"]
                calls.append(Call(item["call_id"], name, item["arguments"]))
            case "custom_tool_call":
                arguments = json.dumps({"input": item["input"]})
                calls.append(Call(item["call_id"], item["name"], arguments))
    return reasoning, content, tuple(calls)


_READERS = {"chat": _read_chat, "messages": _read_messages, "responses": _read_responses}
