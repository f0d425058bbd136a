"""Legacy completions: a text to continue, or a gap to fill, without a conversation.

The prompt is the client's text after the start token; with ``suffix`` it is the model's
fill-in-the-middle layout. No template, no reasoning, no tools. The answer is text, cut at stop
strings by ``deepseek-recipe``'s stream processor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import deepseek_recipe as recipe
import msgspec

from rorqual.errors import PromptTooLongError, RequestError, UnknownModelError
from rorqual.protocol.parse import Event, TokenFeed
from rorqual.protocol.render import Renderer, Sampling, integer, number, parse_body
from rorqual.protocol.tokenizer import BOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

MAX_FILL_TOKENS: Final = 4096
"""Longest text that fills a gap."""
DEFAULT_MAX_TOKENS: Final = 16
"""Answer length where the client names none, as in OpenAI's API."""

_MAX_STOPS = 16


class _Options(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Body(msgspec.Struct, frozen=True):
    """The fields with types of their own; numbers in ranges are checked as in conversations."""

    model: str
    prompt: str | list[str]
    suffix: str | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: _Options | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=393_216)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None


@dataclass(frozen=True, kw_only=True)
class RenderedCompletion:
    """One completion request, ready for an engine and for ``TextAnswer``."""

    model: str
    """The name the client used."""
    prompt_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    echo: str = field(repr=False)
    """What the answer begins with: the prompt where the client asked for it, else nothing."""
    warnings: tuple[str, ...] = ()


def render_completion(renderer: Renderer, body: bytes | Mapping[str, Any]) -> RenderedCompletion:
    """Validate and encode one body for the model of ``renderer``.

    Raises:
        UnknownModelError, PromptTooLongError: as in conversations.
        RequestError: anything else wrong with it; ``param`` is the field where that is known.
    """
    fields = parse_body(body) if isinstance(body, bytes) else dict(body)
    try:
        asked = msgspec.convert(fields, _Body)
    except msgspec.ValidationError as error:
        path = re.search(r"`\$\.?([^`]*)`", str(error))
        missing = re.search(r"missing required field `(\w+)`", str(error))
        param = missing[1] if missing else path[1] if path else None
        raise RequestError(f"invalid request body: {error}", param=param) from None
    except UnicodeEncodeError:
        raise RequestError("a field's name is not valid Unicode: lone surrogate") from None
    card, tokenizer = renderer.card, renderer.tokenizer
    if asked.model not in (card.name, *card.aliases):
        raise UnknownModelError(renderer.unknown_model(asked.model), param="model")
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    if len(prompts) != 1:
        raise RequestError("prompt must be one text", param="prompt")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stop) > _MAX_STOPS or not all(stop):
        raise RequestError(f"stop takes up to {_MAX_STOPS} texts, none empty", param="stop")
    try:
        "".join(stop).encode()
    except UnicodeEncodeError:
        raise RequestError("stop is not valid Unicode: lone surrogate", param="stop") from None
    thinking = fields.get("thinking")
    if thinking is not None and thinking != {"type": "disabled"}:
        raise RequestError("completions do not think", param="thinking")

    ids = _prompt_ids(tokenizer, prompts[0], asked.suffix)
    if len(ids) >= renderer.context_tokens:
        raise PromptTooLongError(
            f"This model's maximum context length is {renderer.context_tokens} tokens. However, "
            f"your prompt has {len(ids)} tokens, which leaves no room for a completion.",
            param="prompt",
        )
    if asked.suffix is not None and (asked.max_tokens or 0) > MAX_FILL_TOKENS:
        raise RequestError(
            f"Invalid max_tokens value, with suffix it is at most {MAX_FILL_TOKENS}",
            param="max_tokens",
        )
    return RenderedCompletion(
        model=asked.model,
        prompt_ids=tuple(ids),
        sampling=_sampling(renderer, fields, asked, len(ids)),
        stop=tuple(stop),
        stream=bool(asked.stream),
        echo=prompts[0] if asked.echo else "",
    )


def _prompt_ids(tokenizer: Tokenizer, prompt: str, suffix: str | None) -> list[int]:
    start = [tokenizer.special_id(BOS)]
    if suffix is None:
        return start + tokenizer.encode_plain(prompt)
    if not all(map(tokenizer.has_special, (FIM_BEGIN, FIM_HOLE, FIM_END))):
        raise RequestError("this model cannot fill in the middle", param="suffix")
    return [
        *start,
        tokenizer.special_id(FIM_BEGIN),
        *tokenizer.encode_plain(prompt),
        tokenizer.special_id(FIM_HOLE),
        *tokenizer.encode_plain(suffix),
        tokenizer.special_id(FIM_END),
    ]


def _sampling(
    renderer: Renderer, fields: Mapping[str, Any], asked: _Body, prompt_tokens: int
) -> Sampling:
    card = renderer.card.sampling
    default = MAX_FILL_TOKENS if asked.suffix is not None else DEFAULT_MAX_TOKENS
    top_p = number(fields, "top_p", 0.0, 1.0, card.top_p if card else 1.0)
    if top_p == 0:
        raise RequestError("Invalid top_p value, the valid range of top_p is (0, 1]", param="top_p")
    return Sampling(
        max_tokens=renderer.answer_tokens(asked.max_tokens, default, prompt_tokens, "max_tokens"),
        temperature=number(fields, "temperature", 0.0, 2.0, card.temperature if card else 1.0),
        top_p=top_p,
        top_k=integer(fields, "top_k"),
        min_p=number(fields, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=number(fields, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=number(fields, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=number(fields, "repetition_penalty", 0.01, 10.0, 1.0),
        seed=asked.seed,
        logprobs=asked.logprobs,
    )


class TextAnswer(TokenFeed):
    """Builds the answer to one completion from its tokens; used as ``protocol.parse.Answer``."""

    def __init__(
        self,
        request: RenderedCompletion,
        tokenizer: Tokenizer,
        answer_id: str,
    ) -> None:
        conversation = recipe.ConversationRequest(
            recipe.Conversation(thinking_mode=False), recipe.ModelVersion.DeepseekV4Pro
        )
        parsing = recipe.ParsingOptions(
            parse_tool_calls=False,
            # Keeps the line breaks a continuation may begin with.
            thinking_initial_stage=recipe.ThinkingInitialStage.ContentContinuation,
            stop_sequences=request.stop,
        )
        generator = recipe.ChatCompletionRequest.chunk_generator(
            conversation, answer_id, request.model
        )
        processor = recipe.StreamProcessor(generator, parsing, tokenizer.stream_decoder)
        super().__init__(processor, tokenizer, len(request.prompt_ids))
        self._head = {
            "id": answer_id,
            "object": "text_completion",
            "created": 0,
            "model": request.model,
        }
        self._is_streamed = request.stream
        self._length = 0
        self._echo = request.echo
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] | None = (
            None if request.sampling.logprobs is None else []
        )
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def end_mark(self) -> Event | None:
        """The event after the last one."""
        return Event(None, "[DONE]")

    def whole(self, created: int) -> str:
        """The complete answer as one JSON object.

        Args:
            created: seconds since the epoch.
        """
        self._head["created"] = created
        logprobs = None if self._logprobs is None else self._legacy(self._logprobs, 0)
        return self._object("".join(self._text), logprobs, self._finish_reason)

    def _taken(self, chunks: Sequence[Any]) -> list[Event]:
        events = []
        for chunk in chunks:
            data = json.loads(chunk.to_json())
            self._head["created"] = data["created"]
            choice = data["choices"][0]
            text = self._echo + (choice["delta"].get("content") or "")
            entries = (choice.get("logprobs") or {}).get("content") or []
            self._finish_reason = choice["finish_reason"]
            self._usage = data.get("usage")
            if self._usage:
                self._usage.pop("completion_tokens_details", None)
            if not (text or entries or self._finish_reason):
                continue
            self._echo = ""
            self._text.append(text)
            logprobs = None
            if self._logprobs is not None:
                self._logprobs += entries
                logprobs = self._legacy(entries, self._length)
            self._length += len(text)
            if self._is_streamed:
                events.append(Event(None, self._object(text, logprobs, self._finish_reason)))
        return events

    def _object(self, text: str, logprobs: Any, finish_reason: str | None) -> str:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return json.dumps(
            {**self._head, "choices": [choice], "usage": self._usage}, separators=(",", ":")
        )

    def _legacy(self, entries: Sequence[Mapping[str, Any]], offset: int) -> dict[str, Any]:
        """Log-probabilities in the shape of legacy completions."""
        tokens = [entry["token"] for entry in entries]
        offsets = [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
            ],
            "text_offset": offsets,
        }
