"""A request body of any of the three protocols to a prompt in token ids and sampling values.

``deepseek-recipe`` validates the body, builds the conversation and renders it; this module adds
what it leaves out: modes across checkpoint generations, the model card's defaults, the context
limit, turns remembered from earlier answers, and an error that says which field is at fault.
Whatever the body, the outcome is a ``RenderedRequest`` or a ``RequestError``. The way back is
``protocol/parse.py``; prompts without a conversation are ``protocol/completions.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, cast

import deepseek_recipe as recipe

from rorqual.errors import PromptTooLongError, RequestError, UnknownModelError
from rorqual.protocol.blame import blame, blame_schema, blame_surrogate, blame_text
from rorqual.protocol.dialects import DIALECTS, Protocol, adapted, limit_name
from rorqual.protocol.history import Memory, Recalled, Span, generated_spans, recall, replaced
from rorqual.protocol.modes import MODES, Mode, ModelCard
from rorqual.protocol.reasoning import Reasoning, asked_reasoning, malformed_field
from rorqual.protocol.tokenizer import SYSTEM, Tokenizer

DEFAULT_MAX_TOKENS: Final[Mapping[Mode, int]] = {
    "non-think": 8192,
    "think": 65_536,
    "think-max": 131_072,
}
"""Answer length in tokens where neither client nor card names one."""

MAX_ANSWER_TOKENS: Final = 393_216
"""Longest answer the model family allows, and the free context think-max was made for."""

_MAX_NAME_CHARS: Final = 200
"""Of an unknown model, repeated in a message."""
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


class Extras(NamedTuple):
    """What a Responses object says of its request."""

    echo: recipe.ResponsesEcho
    namespaces: Mapping[str, tuple[str, str]]
    """Function name -> its (namespace, local name)."""


@dataclass(frozen=True, kw_only=True)
class RenderedRequest:
    """One request, ready for an engine and for the parser of its answer."""

    protocol: Protocol = "chat"
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
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """Declared functions: ``name``, ``parameters`` (JSON schema or None), ``strict``."""
    tool_choice: Literal["auto", "none", "required"] = "auto"
    forced_tool: str | None = None
    """The one function a ``required`` choice names."""
    parallel_tool_calls: bool = True
    """Whether an answer may hold several calls."""
    response_format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})
    """``type``: ``text``, ``json_object``, ``json_schema`` (with ``schema`` and ``strict``) or
    ``regex`` (with ``regex``)."""
    starts_in_reasoning: bool = False
    """Whether the answer begins inside ``<think>``."""
    is_continuation: bool = False
    """Whether the answer continues a message the client began."""
    starts_in_call: bool = False
    """Whether the prompt ends with an opened tool block."""
    thinking_budget: int | None = None
    """Most tokens of reasoning before it is to be closed; None: no limit, or no reasoning."""
    warnings: tuple[str, ...] = ()
    """What is served but probably not wanted."""
    history_digest: str = field(default="", repr=False)
    """Of everything said before the answer; "" where nothing is remembered."""
    conversation: recipe.ConversationRequest = field(repr=False, compare=False)
    """deepseek-recipe's form of the request; the parser starts from it."""
    extras: Extras | None = field(default=None, repr=False, compare=False)


class Renderer:
    """Renders requests for one model. Stateless; safe to share between threads."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        *,
        max_context_tokens: int | None = None,
        is_constrained: bool = False,
        is_strict: bool = False,
    ) -> None:
        """Render for ``card``'s model as run by an engine that takes ``max_context_tokens``.

        Args:
            is_constrained: answers are held to ``tool_choice``, ``tools`` and ``response_format``
                while they are generated: a required tool choice then works while thinking, which
                deepseek-recipe refuses.
            is_strict: refuse tool calls sent back without their reasoning, as the hosted API does.

        Raises ConfigError if ``tokenizer`` lacks a token of the card's prompt layout.
        """
        self.card = card
        self.context_tokens = min(card.context_length, max_context_tokens or card.context_length)
        """Most tokens of prompt and answer together: the one limit, which errors name."""
        self.tokenizer = tokenizer
        self.is_constrained = is_constrained
        self._version = recipe.ModelVersion.DeepseekV4Pro
        self._encoding: recipe.DeepseekV4Encoding | recipe.DeepseekV41Encoding
        if card.generation == "v4.1":
            tokenizer.special_id(SYSTEM)
            self._version = recipe.ModelVersion.DeepseekV41Flash
            self._encoding = recipe.DeepseekV41Encoding()
        else:
            self._encoding = recipe.DeepseekV4Encoding()
        names = (card.name, *card.aliases)
        behaviour = recipe.ReasoningContentBehavior
        self._options = (
            recipe.ConversionOptions(default_thinking_mode=card.default_mode != "non-think")
            .with_model_versions_by_name(dict.fromkeys(names, self._version))
            .with_reasoning_content_behavior(behaviour.Reject if is_strict else behaviour.FillEmpty)
        )
        self._suffixed: Mapping[str, Mode] = MappingProxyType(
            {
                f"{name}{separator}{mode}": mode
                for name in names
                for separator in ("-", ":")
                for mode in MODES
                if f"{name}{separator}{mode}" not in names
            }
        )

    def render(
        self,
        body: bytes | Mapping[str, Any],
        protocol: Protocol = "chat",
        memory: Memory | None = None,
    ) -> RenderedRequest:
        """Validate, convert, render and encode one body. Takes seconds on a very long prompt.

        Args:
            body: the JSON text, or the object it stands for; not changed.
            memory: turns generated earlier; they come back as they were generated.

        Raises:
            UnknownModelError: the body names a model other than the card's.
            PromptTooLongError: prompt and answer exceed ``context_tokens``.
            RequestError: anything else wrong with it; ``param`` is the field where that is known.
        """
        fields = parse_body(body) if isinstance(body, bytes) else dict(body)
        known, suffix = self._addressed(fields, protocol)
        reasoning = asked_reasoning(
            known,
            self.card.generation,
            self.card.default_mode,
            suffix,
            effort_is_independent=protocol == "messages",
        )
        native = adapted(protocol, known, reasoning and reasoning.level)
        choice, forced = _tool_choice(native.get("tool_choice"))
        is_deferred = reasoning is not None and self._defers_choice(reasoning, choice)
        if is_deferred:
            native["tool_choice"] = {"type": "auto"} if protocol == "messages" else "auto"
        converted, extras = self._convert(native, fields, protocol)
        if reasoning is None:
            path = malformed_field(known, self.card.generation) or "thinking"
            raise RequestError(f"Invalid {path} value", param=path)
        conversation = converted.conversation
        if protocol == "messages" and (schema := _messages_schema(fields)) is not None:
            conversation = replaced(conversation, response_schema=schema)
        tools = tuple(
            {"name": tool.name, "parameters": tool.parameters, "strict": bool(tool.strict)}
            for tool in conversation.tools
        )
        if forced is not None and forced not in [tool["name"] for tool in tools]:
            raise RequestError(f"tool_choice names no declared tool: {forced}", param="tool_choice")
        recalled = Recalled(conversation, {}, "")
        if memory is not None:
            recalled = recall(conversation, memory)
        prompt, ranges, ids = self._encode(recalled)
        options, parsing = converted.inference_options, converted.parsing_options
        mode = reasoning.level.mode
        sampling = self._sampling(fields, protocol, mode, options, len(ids))
        starts_in_reasoning = (
            parsing.thinking_initial_stage is not None
            and parsing.thinking_initial_stage.starts_in_reasoning()
        )
        is_required = is_deferred or conversation.tool_choice == "required"
        return RenderedRequest(
            protocol=protocol,
            model=cast("str", fields["model"]),
            mode=mode,
            prompt=prompt,
            special_ranges=ranges,
            prompt_ids=ids,
            sampling=sampling,
            stop=tuple(parsing.stop_sequences),
            stream=converted.stream,
            tools_declared=parsing.parse_tool_calls,
            constraint=_constraint(options.output_constraint),
            tools=tools if conversation.tool_choice != "none" else (),
            tool_choice="required" if is_required else conversation.tool_choice,
            forced_tool=forced if is_required else None,
            parallel_tool_calls=_allows_parallel_calls(fields),
            response_format=_response_format(conversation, _is_strict(fields, protocol)),
            starts_in_reasoning=starts_in_reasoning,
            is_continuation=any(message.prefix for message in conversation.messages[-1:]),
            starts_in_call=parsing.starts_in_tool_calls,
            thinking_budget=reasoning.limit(sampling.max_tokens) if starts_in_reasoning else None,
            warnings=self._warnings(mode, len(ids)),
            history_digest=recalled.digest,
            conversation=converted,
            extras=extras,
        )

    def _addressed(
        self, fields: Mapping[str, Any], protocol: Protocol
    ) -> tuple[dict[str, Any], Mode | None]:
        """The body under the card's own name, and the mode its model name ends in."""
        known = dict(fields)
        name = fields.get("model")
        if isinstance(name, str):
            if (suffix := self._suffixed.get(name)) is not None:
                known["model"] = self.card.name
                return known, suffix
            # As hosted: clients built for Claude ask for it by name whatever they are pointed at.
            if protocol == "messages" and name.startswith("claude-"):
                known["model"] = self.card.name
        return known, None

    def _defers_choice(self, reasoning: Reasoning, choice: str | None) -> bool:
        """Whether a required call is left to the constraint, since reasoning comes first."""
        thinks = reasoning.level.mode != "non-think"
        return self.is_constrained and thinks and choice == "required"

    def _convert(
        self, native: dict[str, Any], fields: Mapping[str, Any], protocol: Protocol
    ) -> tuple[recipe.ConversationRequest, Extras | None]:
        limit = limit_name(protocol, fields)
        ours = DIALECTS[protocol].limit_names[0]
        try:
            request = DIALECTS[protocol].request(native)
            extras = None
            if protocol == "responses":
                echo = recipe.ResponsesRequest(dict(fields)).echo()
                extras = Extras(echo, request.namespace_tool_map(self._options))
            return request.convert(self._options), extras
        except recipe.ConversionError as error:
            message = str(error)
            kind = UnknownModelError if "API model names" in message else RequestError
            if kind is UnknownModelError:
                message = self.unknown_model(fields.get("model"))
            param = blame_text(message, DIALECTS[protocol].history)
            if param in (None, "tools"):
                param = blame_schema(native, message, protocol, self._options) or param
            if param == "max_tokens":
                message, param = message.replace("max_tokens", limit), limit
            if protocol == "messages" and param is not None and param not in message:
                message = f"{message} (at {param})"  # its errors have no field for that
            raise kind(message, param=param) from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            message = str(error)
            param = blame(native, message, protocol)
            param = limit if param == ours else param
            if param is not None and param not in message:
                message = f"{message} (at {param})"
            raise RequestError(message, param=param) from None

    def unknown_model(self, name: object) -> str:
        """What to say to a client that asks for the model ``name``."""
        names = ", ".join((self.card.name, *self.card.aliases))
        passed = str(name)
        passed = passed if len(passed) <= _MAX_NAME_CHARS else f"{passed[:_MAX_NAME_CHARS]}..."
        return f"The supported API model names are {names}, but you passed {passed}."

    def _encode(
        self, recalled: Recalled
    ) -> tuple[str, tuple[tuple[int, int], ...], tuple[int, ...]]:
        """Prompt, template ranges and ids; recognised turns in the tokens they were made of."""
        limit = self.context_tokens
        rendered = self._encoding.render_conversation(recalled.conversation)
        prompt, ranges = rendered.prompt, tuple(rendered.special_ranges)
        # Cheap rejection first: no token stands for more characters than the longest one.
        if (at_least := len(prompt) // self.tokenizer.max_token_bytes) >= limit:
            raise _too_long(limit, f"at least {at_least}")
        spans: list[Span] = []
        if recalled.turns:
            roles = [message.role for message in recalled.conversation.messages]
            spans = generated_spans(
                prompt, ranges, roles.count("assistant"), recalled.turns, self.tokenizer
            )
        if spans:
            prompt, ranges, ids = self.tokenizer.encode_spliced(prompt, ranges, spans)
        else:
            ids = self.tokenizer.encode_prompt(prompt, ranges)
        if len(ids) >= limit:
            raise _too_long(limit, str(len(ids)))
        return prompt, ranges, tuple(ids)

    def _sampling(
        self,
        fields: Mapping[str, Any],
        protocol: Protocol,
        mode: Mode,
        options: recipe.InferenceOptions,
        prompt_tokens: int,
    ) -> Sampling:
        penalties = {
            name: number(fields, name, low, high, default)
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
            max_tokens=self.answer_tokens(
                options.max_tokens,
                self.card.default_max_tokens or DEFAULT_MAX_TOKENS[mode],
                prompt_tokens,
                limit_name(protocol, fields),
                # Clients of this protocol must send a limit, so it is not a wish for that many.
                is_lowered=protocol == "messages",
            ),
            temperature=temperature,
            top_p=top_p,
            top_k=integer(fields, "top_k"),
            min_p=number(fields, "min_p", 0.0, 1.0, 0.0),
            repetition_penalty=number(fields, "repetition_penalty", 0.01, 10.0, 1.0),
            seed=options.seed,
            logprobs=(options.top_logprobs or 0) if options.logprobs else None,
            **penalties,
        )

    def answer_tokens(
        self,
        asked: int | None,
        default: int,
        prompt_tokens: int,
        param: str,
        *,
        is_lowered: bool = False,
    ) -> int:
        """Tokens an answer may have; ``default``, or ``is_lowered``, gives way to the context.

        Raises PromptTooLongError blaming ``param`` if what was ``asked`` does not fit.
        """
        limit = self.context_tokens
        if asked is None or is_lowered:
            return min(default if asked is None else asked, limit - prompt_tokens)
        if prompt_tokens + asked > limit:
            raise PromptTooLongError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{prompt_tokens + asked} tokens ({prompt_tokens} in the messages, "
                f"{asked} in the completion). Please reduce the length of the messages or "
                "completion.",
                param=param,
            )
        return asked

    def _warnings(self, mode: Mode, prompt_tokens: int) -> tuple[str, ...]:
        free = self.context_tokens - prompt_tokens
        if mode != "think-max" or free >= MAX_ANSWER_TOKENS:
            return ()
        return (
            f"think-max is made for {MAX_ANSWER_TOKENS} tokens of free context; {free} are left",
        )


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises RequestError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        # Half of a surrogate pair can only be written as an escape.
        half = blame_surrogate(value) if b"\\ud" in body or b"\\uD" in body else None
    except RecursionError:
        raise RequestError("invalid JSON request: nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"invalid JSON request: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("invalid JSON request: the body must be a JSON object")
    if half is not None:
        raise RequestError(f"{half} is not valid Unicode: it has a lone surrogate", param=half)
    return cast("dict[str, Any]", value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _tool_choice(choice: Any) -> tuple[str | None, str | None]:
    """(``required`` or None, the function named) in any protocol's way of asking for a call."""
    if choice in ("required", "any"):
        return "required", None
    if not isinstance(choice, dict):
        return None, None
    if choice.get("type") == "any":
        return "required", None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    is_named = choice.get("type") in ("function", "tool", "custom") and isinstance(name, str)
    return ("required", name) if is_named else (None, None)


def _messages_schema(fields: Mapping[str, Any]) -> Any:
    """The JSON schema a Messages body wants its answer in, which deepseek-recipe overlooks."""
    output = fields.get("output_config")
    wanted = output.get("format") if isinstance(output, dict) else None
    param = "output_config.format"
    if wanted is None:
        wanted, param = fields.get("output_format"), "output_format"
    if wanted is None:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        raise RequestError(f"{param} must be of type json_schema", param=f"{param}.type")
    if not isinstance(wanted.get("schema"), dict):
        raise RequestError(f"{param}.schema must be a JSON schema", param=f"{param}.schema")
    return wanted["schema"]


def _response_format(conversation: recipe.Conversation, is_strict: bool) -> Mapping[str, Any]:
    if (schema := conversation.response_schema) is not None:
        return {"type": "json_schema", "schema": schema, "strict": is_strict}
    if conversation.response_regex is not None:
        return {"type": "regex", "regex": conversation.response_regex}
    return {"type": conversation.response_format}


def _is_strict(fields: Mapping[str, Any], protocol: Protocol) -> bool:
    """Whether a JSON schema is to be kept to the letter; always in Messages."""
    if protocol == "messages":
        return True
    path = ("text", "format") if protocol == "responses" else ("response_format", "json_schema")
    value: Any = fields
    for name in (*path, "strict"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value is True


def _allows_parallel_calls(fields: Mapping[str, Any]) -> bool:
    choice = fields.get("tool_choice")
    single = isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use") is True
    return not single and fields.get("parallel_tool_calls") is not False


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


def number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """The field ``name``. Raises RequestError unless it is a number in [``low``, ``high``]."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(
            f"Invalid {name} value, the valid range of {name} is [{low:g}, {high:g}]", param=name
        )
    return float(value)


def integer(fields: Mapping[str, Any], name: str) -> int:
    """The field ``name``, 0 if absent. Raises RequestError unless it is an integer >= 0."""
    value = fields.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"Invalid {name} value, it must be an integer >= 0", param=name)
    return value
