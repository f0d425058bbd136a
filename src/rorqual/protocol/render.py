"""A Chat Completions body to a prompt in token ids and resolved sampling values.

``deepseek-recipe`` validates the body, builds the conversation and renders it; this module adds
what it leaves out: modes across checkpoint generations, the model card's defaults, the context
limit, and an error that says which field is at fault. Whatever the body, the outcome is a
``RenderedRequest`` or a ``RequestError``. The way back is ``protocol/parse.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import deepseek_recipe as recipe

from rorqual.errors import PromptTooLongError, RequestError, UnknownModelError
from rorqual.protocol.blame import blame, blame_text
from rorqual.protocol.modes import Level, Mode, ModelCard, requested_level
from rorqual.protocol.tokenizer import SYSTEM, Tokenizer

DEFAULT_MAX_TOKENS: Final[Mapping[Mode, int]] = {
    "non-think": 8192,
    "think": 65_536,
    "think-max": 131_072,
}
"""Answer length in tokens where neither client nor card names one."""

_PENALTIES: Final = {
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
}
"""OpenAI's sampling fields beyond temperature and top_p: lowest, highest, default."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the answer; every value resolved and in range."""

    max_tokens: int
    """At least 1, and prompt + max_tokens fits the context."""
    temperature: float
    """In [0, 2]; 0 is greedy."""
    top_p: float
    """In (0, 1]."""
    top_k: int
    """0 keeps all."""
    min_p: float
    """In [0, 1]."""
    presence_penalty: float
    frequency_penalty: float
    """Both in [-2, 2]."""
    repetition_penalty: float
    """In [0.01, 10]; 1 does nothing."""
    seed: int | None
    """In [0, 2^63)."""
    logprobs: int | None
    """None: none wanted. n: the drawn token's and the n most likely ones', 0..20."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the answer should obey; enforcing it is up to the engine's caller."""

    kind: str
    """``json``, ``regex``, ``tool_call`` or ``tool_call_required``."""
    schema: str
    """JSON schema, regular expression or tool list; empty for any JSON value."""


@dataclass(frozen=True, kw_only=True)
class RenderedRequest:
    """One Chat Completions request, ready for an engine and for the parser of its answer."""

    model: str
    """The name the client used."""
    mode: Mode
    prompt: str = field(repr=False)
    special_ranges: tuple[tuple[int, int], ...] = field(repr=False)
    """Code point ranges of ``prompt`` that are template tokens; the rest is anybody's text."""
    prompt_ids: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    stop: tuple[str, ...]
    """Strings that end the answer text; the parser applies them, not the engine."""
    stream: bool
    tools_declared: bool
    """Whether tool calls are parsed out of the answer."""
    constraint: Constraint | None
    conversation: recipe.ConversationRequest = field(repr=False, compare=False)
    """deepseek-recipe's form of the request; the parser starts from it."""


class Renderer:
    """Renders requests for one model. Stateless; safe to share between threads."""

    def __init__(
        self, card: ModelCard, tokenizer: Tokenizer, *, max_context_tokens: int | None = None
    ) -> None:
        """Render for ``card``'s model as run by an engine that takes ``max_context_tokens``.

        Raises ConfigError if ``tokenizer`` lacks a token of the card's prompt layout.
        """
        self.card = card
        self.context_tokens = min(card.context_length, max_context_tokens or card.context_length)
        """Most tokens of prompt and answer together: the one limit, which errors name."""
        self.tokenizer = tokenizer
        version = recipe.ModelVersion.DeepseekV4Pro
        self._encoding: recipe.DeepseekV4Encoding | recipe.DeepseekV41Encoding
        if card.generation == "v4.1":
            tokenizer.special_id(SYSTEM)
            version = recipe.ModelVersion.DeepseekV41Flash
            self._encoding = recipe.DeepseekV41Encoding()
        else:
            self._encoding = recipe.DeepseekV4Encoding()
        self._options = recipe.ConversionOptions(
            default_thinking_mode=card.default_mode != "non-think"
        ).with_model_versions_by_name(dict.fromkeys((card.name, *card.aliases), version))

    def render(self, body: bytes | Mapping[str, Any]) -> RenderedRequest:
        """Validate, convert, render and encode one body. Takes seconds on a very long prompt.

        Args:
            body: the JSON text, or the object it stands for; not changed.

        Raises:
            UnknownModelError: the body names a model other than the card's.
            PromptTooLongError: prompt and answer exceed ``context_tokens``.
            RequestError: anything else wrong with it; ``param`` is the field where that is known.
        """
        fields = _parse(body) if isinstance(body, bytes) else dict(body)
        level = requested_level(
            self.card.generation,
            self.card.default_mode,
            fields.get("thinking"),
            fields.get("reasoning_effort"),
        )
        limit_name = _limit_name(fields)
        conversation = self._convert(_adapted(fields, level), limit_name)
        if level is None:
            raise RequestError("reasoning_effort must be a string", param="reasoning_effort")
        prompt = self._encoding.render_conversation(conversation.conversation)
        ids = self._encode(prompt)
        options = conversation.inference_options
        return RenderedRequest(
            model=cast("str", fields["model"]),
            mode=level.mode,
            prompt=prompt.prompt,
            special_ranges=tuple(prompt.special_ranges),
            prompt_ids=tuple(ids),
            sampling=self._sampling(fields, level.mode, options, len(ids)),
            stop=tuple(conversation.parsing_options.stop_sequences),
            stream=conversation.stream,
            tools_declared=conversation.parsing_options.parse_tool_calls,
            constraint=_constraint(options.output_constraint),
            conversation=conversation,
        )

    def _convert(self, fields: dict[str, Any], limit_name: str) -> recipe.ConversationRequest:
        try:
            return recipe.ChatCompletionRequest(fields).convert(self._options)
        except recipe.ConversionError as error:
            message = str(error)
            kind = UnknownModelError if "API model names" in message else RequestError
            if (param := blame_text(message)) == "max_tokens":
                message, param = message.replace("max_tokens", limit_name), limit_name
            raise kind(message, param=param) from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            message = str(error)
            param = blame(fields, message)
            param = limit_name if param == "max_tokens" else param
            if param is not None and param not in message:
                message = f"{message} (at {param})"
            raise RequestError(message, param=param) from None

    def _encode(self, prompt: recipe.RenderedPrompt) -> list[int]:
        limit = self.context_tokens
        # Cheap rejection first: no token stands for more characters than the longest one.
        if (at_least := len(prompt.prompt) // self.tokenizer.max_token_bytes) >= limit:
            raise _too_long(limit, f"at least {at_least}")
        ids = self.tokenizer.encode_prompt(prompt.prompt, prompt.special_ranges)
        if len(ids) >= limit:
            raise _too_long(limit, str(len(ids)))
        return ids

    def _sampling(
        self,
        fields: Mapping[str, Any],
        mode: Mode,
        options: recipe.InferenceOptions,
        prompt_tokens: int,
    ) -> Sampling:
        limit = self.context_tokens
        max_tokens = options.max_tokens
        if max_tokens is None:
            default = self.card.default_max_tokens or DEFAULT_MAX_TOKENS[mode]
            max_tokens = min(default, limit - prompt_tokens)
        elif prompt_tokens + max_tokens > limit:
            raise PromptTooLongError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the messages, "
                f"{max_tokens} in the completion). Please reduce the length of the messages or "
                "completion.",
                param=_limit_name(fields),
            )
        penalties = {
            name: _number(fields, name, low, high, default)
            for name, (low, high, default) in _PENALTIES.items()
        }
        if (recommended := self.card.sampling) is not None:
            temperature = _or(fields.get("temperature"), recommended.temperature)
            top_p = _or(fields.get("top_p"), recommended.top_p)
        else:
            temperature = _honoured(fields.get("temperature"), options.temperature)
            top_p = _honoured(fields.get("top_p"), options.top_p)
            if mode != "non-think":
                penalties = dict.fromkeys(penalties, 0.0)
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=_integer(fields, "top_k"),
            min_p=_number(fields, "min_p", 0.0, 1.0, 0.0),
            repetition_penalty=_number(fields, "repetition_penalty", 0.01, 10.0, 1.0),
            seed=options.seed,
            logprobs=(options.top_logprobs or 0) if options.logprobs else None,
            **penalties,
        )


def _parse(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("invalid JSON request: nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"invalid JSON request: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("invalid JSON request: the body must be a JSON object")
    return cast("dict[str, Any]", value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _adapted(fields: Mapping[str, Any], level: Level | None) -> dict[str, Any]:
    """The body in the recipe's terms: its effort word, and ``max_tokens`` under its old name."""
    adapted = dict(fields)
    if level is not None and level.prompt_effort is not None:
        adapted["reasoning_effort"] = level.prompt_effort
    if _limit_name(fields) == "max_completion_tokens":
        adapted["max_tokens"] = fields["max_completion_tokens"]
    return adapted


def _limit_name(fields: Mapping[str, Any]) -> str:
    """Which of its two names the client gave ``max_tokens``."""
    is_new = fields.get("max_tokens") is None and "max_completion_tokens" in fields
    return "max_completion_tokens" if is_new else "max_tokens"


def _constraint(constraint: recipe.OutputConstraint | None) -> Constraint | None:
    if constraint is None:
        return None
    return Constraint(kind=constraint.kind, schema=constraint.schema)


def _too_long(limit: int, prompt_tokens: str) -> PromptTooLongError:
    return PromptTooLongError(
        f"This model's maximum context length is {limit} tokens. However, your messages have "
        f"{prompt_tokens} tokens, which leaves no room for a completion. Please reduce the length "
        "of the messages.",
        param="messages",
    )


def _honoured(sent: float | None, resolved: float | None) -> float:
    """What the recipe made of ``sent``, in the client's own digits: the recipe has float32."""
    if resolved is None:
        return 1.0
    is_kept = sent is not None and math.isclose(sent, resolved, rel_tol=1e-6)
    if sent is not None and is_kept:
        return float(sent)
    return max(round(float(resolved), 6), 1e-6)  # the recipe's own value, without float32's tail


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(
            f"Invalid {name} value, the valid range of {name} is [{low:g}, {high:g}]", param=name
        )
    return float(value)


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"Invalid {name} value, it must be an integer >= 0", param=name)
    return value
