"""What an answer must look like: tool blocks, response formats and thinking budgets.

``build_constraint`` turns a request's fields into a ``ConstraintSpec``; an engine starts one
``AnswerConstraint`` of it per sequence. An answer passes through phases: reasoning, until
``</think>``; then either free text, until a tool block opens, or a grammar from its first token.
Free text costs the model nothing but a look at the last few bytes. No torch; no HTTP.

The spelling ``<｜DSML｜`` opens a tool block wherever it stands, as in the official parser, so a
model that wants to talk about the tag calls a tool instead. Added tokens never occur inside
values, nor is ``｜DSML｜`` ever spelled out in ordinary tokens: that parser takes the spelling for
text, but whoever reads the text afterwards could not tell it from markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import llguidance

from rorqual.errors import EngineError, RequestError
from rorqual.protocol.grammars import GrammarError, Grammars
from rorqual.protocol.modes import Generation
from rorqual.protocol.schema_text import json_rule, regex
from rorqual.protocol.tokenizer import DSML, THINK_END, Tokenizer
from rorqual.protocol.tool_grammar import MAX_CALLS, BlockGrammar, Tool

if TYPE_CHECKING:
    from rorqual.protocol.render import RenderedRequest

DEFAULT_MAX_BLOCK_TOKENS = 65_536
"""Longest tool block unless the caller says otherwise: a large file written in one call."""


@dataclass(frozen=True, kw_only=True)
class ConstraintSpec:
    """What one request's answer must look like: plain data and the grammars' owner. Immutable."""

    starts_reasoning: bool
    """Whether the answer begins inside ``<think>``."""
    max_thinking_tokens: int | None = None
    """Reasoning tokens after which ``</think>`` is forced."""
    answer: str | None = None
    """Grammar of everything after the reasoning; None: free text."""
    answer_prefix: tuple[int, ...] = ()
    """Tokens of that text which the prompt already holds."""
    block: str | None = None
    """Grammar of a tool block from after ``<｜DSML｜``, which opens one in free text; None: it is
    not allowed to open one."""
    max_grammar_tokens: int | None = None
    """Tokens under a grammar after which the answer ends with ``length``."""
    dsml_id: int
    think_end_id: int
    grammars: Grammars = field(repr=False, compare=False)

    def start(self) -> AnswerConstraint:
        """A constraint for one sequence. Raises EngineError."""
        return AnswerConstraint(self)


class _State(NamedTuple):
    """What of an answer's past matters, beside the grammar's own state."""

    phase: Literal["reasoning", "free", "grammar"]
    num_reasoning: int = 0
    num_grammar: int = 0
    dsml_spelled: int = 0
    think_spelled: int = 0
    after_bracket: bool = False
    """Whether the text ends in ``<``."""


class AnswerConstraint:
    """One answer being followed; satisfies ``engine.grammar.Constraint``. Not thread-safe."""

    def __init__(self, spec: ConstraintSpec) -> None:
        """Raises EngineError if a grammar no longer compiles."""
        self._spec = spec
        grammars = spec.grammars
        text = spec.answer if spec.answer is not None else spec.block
        try:
            self._prototype = None if text is None else grammars.compiled(text)
        except GrammarError as error:
            raise EngineError(f"the grammar of the answer does not compile: {error}") from None
        self._matcher: llguidance.LLMatcher | None = None
        self._dsml = grammars.spelling(DSML)
        self._think = grammars.spelling(THINK_END)
        self._state = _State("reasoning")
        if not spec.starts_reasoning:
            self._state = self._begun(self._state)

    def mask(self) -> bytes | None:
        """The allowed tokens as bits, lowest first; None allows all."""
        spec, state = self._spec, self._state
        if state.phase == "reasoning":
            budget = spec.max_thinking_tokens
            if budget is None or state.num_reasoning < budget:
                return None
            return (1 << spec.think_end_id).to_bytes(spec.think_end_id // 8 + 1, "little")
        if state.phase == "free" or self._matcher is None:
            return None
        mask = self._matcher.compute_bitmask()
        self._check(not self._matcher.is_error())
        return mask

    def forbidden(self) -> Sequence[int]:
        """A few tokens not allowed even so."""
        spec, state = self._spec, self._state
        spelled = self._dsml.completed_by[state.dsml_spelled]
        if state.phase == "grammar":
            return spelled
        spelled += self._think.completed_by[state.think_spelled]
        may_open = self._may_open and state.after_bracket
        if not may_open:
            spelled += (spec.dsml_id,)
        return (*spelled, spec.grammars.eos_id) if state.phase == "reasoning" else spelled

    def accept(self, token_id: int) -> None:
        """Follow one allowed token.

        Raises:
            EngineError: the grammar does not allow it.
        """
        spec, state = self._spec, self._state
        if token_id in spec.grammars.added:
            state = state._replace(dsml_spelled=0, think_spelled=0, after_bracket=False)
        else:
            spelling = spec.grammars.tokens[token_id]
            state = state._replace(
                dsml_spelled=self._dsml.after(state.dsml_spelled, spelling),
                think_spelled=self._think.after(state.think_spelled, spelling),
                after_bracket=spelling.endswith(b"<"),
            )
        if state.phase == "grammar":
            assert self._matcher is not None
            self._check(self._matcher.consume_token(token_id))
            state = state._replace(num_grammar=state.num_grammar + 1)
        elif token_id == spec.dsml_id and self._may_open:
            state = self._under_grammar(state)
        elif state.phase == "reasoning":
            state = state._replace(num_reasoning=state.num_reasoning + 1)
            if token_id == spec.think_end_id:
                state = self._begun(state)
        self._state = state

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why the answer ends here, if it does."""
        if self._matcher is None:
            return None
        if self._matcher.is_stopped():
            self._check(not self._matcher.is_error())
            return "stop"
        limit = self._spec.max_grammar_tokens
        return "length" if limit is not None and self._state.num_grammar >= limit else None

    @property
    def _may_open(self) -> bool:
        """Whether a tool block may open in free text."""
        return self._spec.answer is None and self._spec.block is not None

    def _begun(self, state: _State) -> _State:
        """``state`` as the answer proper begins."""
        state = state._replace(think_spelled=0)
        return (
            state._replace(phase="free")
            if self._spec.answer is None
            else self._under_grammar(state)
        )

    def _under_grammar(self, state: _State) -> _State:
        assert self._prototype is not None
        self._matcher = self._prototype.deep_copy()
        self._check(self._matcher.consume_tokens(list(self._spec.answer_prefix)))
        return state._replace(phase="grammar")

    def _check(self, is_well: bool) -> None:
        if not is_well:
            reason = self._matcher.get_error() if self._matcher is not None else ""
            raise EngineError(
                f"the grammar of the answer gave up: {reason.strip().splitlines()[:1]}"
            )


def build_constraint(
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    response_format: Mapping[str, Any] | None = None,
    thinking: bool,
    max_thinking_tokens: int | None = None,
    parallel_tool_calls: bool = True,
    block_is_open: bool = False,
    content_prefix: str = "",
    generation: Generation = "ga",
    max_calls: int = MAX_CALLS,
    max_block_tokens: int | None = DEFAULT_MAX_BLOCK_TOKENS,
) -> ConstraintSpec | None:
    """The constraint on a request's answer; None if there is nothing to obey.

    Compiles what it returns, which takes milliseconds, or seconds for the largest schemas and
    the first grammar of a large vocabulary: call it on a worker thread.

    Args:
        tools: function tools as in Chat Completions, ``{"type", "function": {"name", "parameters",
            "strict"}}``; the flat forms of Responses and Messages are understood too.
        tool_choice: ``none``, ``auto``, ``required``, or an object naming a function, in any of
            the three protocols' forms.
        response_format: ``{"type": "json_object"}``, ``{"type": "json_schema", "json_schema":
            {"schema", "strict"}}``, ``{"type": "regex", "regex"}`` or ``{"type": "text"}``.
        thinking: whether the answer begins inside ``<think>``.
        max_thinking_tokens: reasoning tokens after which ``</think>`` follows; None: no bound.
        block_is_open: the prompt already ends with the opened tool block.
        content_prefix: answer text the prompt already ends with, for the model to continue.
        generation: of the checkpoint; V4.1 spells the tags differently.
        max_calls: most calls in a block.
        max_block_tokens: longest tool block; None: no bound of its own.

    Raises:
        RequestError: a schema, name or choice is wrong; ``param`` is its path in the request.
    """
    if max_thinking_tokens is not None and max_thinking_tokens < 0:
        raise RequestError("a thinking budget must be >= 0", param="max_thinking_tokens")
    try:
        return _built(
            tokenizer,
            _functions(tools),
            _choice(tool_choice),
            response_format,
            _Settings(
                thinking,
                max_thinking_tokens,
                block_is_open,
                content_prefix,
                generation,
                min(max_calls, MAX_CALLS) if parallel_tool_calls else 1,
                max_block_tokens,
            ),
        )
    except RecursionError:
        param = "tools" if tools else "response_format"
        raise RequestError(f"{param}: a schema is nested too deeply", param=param) from None


def constraint_of(
    request: RenderedRequest, tokenizer: Tokenizer, generation: Generation
) -> ConstraintSpec | None:
    """The constraint on the answer to a rendered request. Arguments, errors and cost as of
    ``build_constraint``."""
    name = request.forced_tool
    tools: list[Mapping[str, Any]] = [*request.tools]
    if request.protocol == "chat":
        tools = [{"function": tool} for tool in request.tools]
    elif request.protocol == "messages":
        tools = [{**tool, "input_schema": tool["parameters"]} for tool in request.tools]
    return build_constraint(
        tokenizer,
        tools=tools,
        tool_choice=request.tool_choice if name is None else {"type": "tool", "name": name},
        response_format=request.response_format,
        thinking=request.starts_in_reasoning,
        max_thinking_tokens=request.thinking_budget,
        parallel_tool_calls=request.parallel_tool_calls,
        block_is_open=request.starts_in_call,
        content_prefix="" if request.starts_in_reasoning else _continued(request),
        generation=generation,
    )


def _continued(request: RenderedRequest) -> str:
    """The answer text at the prompt's end, if the model is to continue one."""
    start = max((end for _, end in request.special_ranges), default=0)
    return request.prompt[start:] if request.is_continuation else ""


class _Settings(NamedTuple):
    thinking: bool
    max_thinking_tokens: int | None
    block_is_open: bool
    content_prefix: str
    generation: Generation
    max_calls: int
    max_block_tokens: int | None


def _built(
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    choice: tuple[str, str | None],
    response_format: Mapping[str, Any] | None,
    settings: _Settings,
) -> ConstraintSpec | None:
    grammars = tokenizer.grammars
    kind, name = choice
    content = _content(response_format)
    usable = [tool for tool in tools if name in (None, tool.name)]
    if kind == "required" and not usable:
        problem = "no tools are declared" if name is None else f"there is no tool {name!r}"
        raise RequestError(f"tool_choice: {problem}", param="tool_choice")
    block = None
    if usable and kind != "none":
        block = BlockGrammar(
            usable,
            dsml_id=tokenizer.special_id(DSML),
            spaced_tags=settings.generation == "v4.1",
            max_calls=1 if name is not None else settings.max_calls,
            compiles=grammars.compiled,
        )
    answer = opened = None
    if block is not None and kind == "required":
        answer = _lark(block.inside if settings.block_is_open else block.whole, block.rules)
    elif content is not None:
        start, rule = content
        answer = _lark(start, rule)
        if block is not None:
            answer = _lark(f"{start} | {block.whole}", rule, block.rules)
    elif block is not None:
        opened = _lark(block.after_marker, block.rules)
    elif not tools and (settings.max_thinking_tokens is None or not settings.thinking):
        return None
    spec = ConstraintSpec(
        starts_reasoning=settings.thinking,
        max_thinking_tokens=settings.max_thinking_tokens,
        answer=answer,
        answer_prefix=tuple(tokenizer.encode_plain(settings.content_prefix if content else "")),
        block=opened,
        max_grammar_tokens=settings.max_block_tokens if block else None,
        dsml_id=tokenizer.special_id(DSML),
        think_end_id=tokenizer.think_end_id,
        grammars=grammars,
    )
    _try_out(spec, "tools" if block else "response_format")
    return spec


def _try_out(spec: ConstraintSpec, param: str) -> None:
    """Do once what the first answer would need, so that the engine's thread need not.

    Raises RequestError, blaming ``param``, if no answer can obey ``spec``.
    """
    for spelled in (DSML, THINK_END):
        spec.grammars.spelling(spelled)
    text = spec.answer if spec.answer is not None else spec.block
    if text is None:
        return
    try:
        matcher = spec.grammars.compiled(text).deep_copy()
    except GrammarError as error:
        raise RequestError(f"{param}: cannot be enforced: {error}", param=param) from None
    if not matcher.consume_tokens(list(spec.answer_prefix)):
        raise RequestError("messages: the prefix does not begin a valid answer", param="messages")
    if problem := _problem_of(matcher):
        spec.grammars.forget(text)
        raise RequestError(f"{param}: {problem}", param=param)


def _problem_of(matcher: llguidance.LLMatcher) -> str:
    """Why ``matcher`` cannot be followed even one token further; empty if it can, or has ended."""
    mask = b"" if matcher.is_stopped() else matcher.compute_bitmask()
    if mask and not matcher.is_error():
        allowed = int.from_bytes(mask, "little")
        if not allowed:
            return "no answer is valid"
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
        matcher.is_stopped()
    if not matcher.is_error():
        return ""
    reason = matcher.get_error().strip().split("\n")[0]
    dead_end = reason == "NoExtensionBias"  # as llguidance calls it
    return "no answer is valid" if dead_end else f"cannot be enforced: {reason}"


def _lark(start: str, *rules: str) -> str:
    return "\n".join([f"start: {start}", *rules])


def _content(response_format: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Start expression and rules of the answer text a response format asks for."""
    wanted = response_format or {}
    match wanted.get("type", "text"):
        case "text":
            return None
        case "json_object":
            schema: Any = {"type": "object"}
            return "content", f"content: {json_rule(schema, {}, lenient=True)}"
        case "json_schema":
            holder = wanted.get("json_schema", wanted)
            path = "response_format.json_schema.schema"
            schema = holder.get("schema", True) if isinstance(holder, Mapping) else None
            if not isinstance(schema, Mapping | bool):
                raise RequestError(f"{path} must be a JSON Schema", param=path)
            root = schema if isinstance(schema, Mapping) else {}
            try:
                rule = json_rule(schema, root, lenient=not holder.get("strict"))
                error = _error_in(rule)
            except GrammarError as endless:
                error = str(endless)
            if error:
                raise RequestError(f"{path}: cannot be enforced: {error}", param=path)
            return "content", f"content: {rule}"
        case "regex":
            pattern = wanted.get("regex")
            path = "response_format.regex"
            if not isinstance(pattern, str):
                raise RequestError(f"{path} must be a string", param=path)
            if error := _error_in(regex(pattern)):
                raise RequestError(f"{path}: cannot be enforced: {error}", param=path)
            return "CONTENT", f"CONTENT: {regex(pattern)}"
        case other:
            path = "response_format.type"
            raise RequestError(f"{path}: unknown type {other!r}", param=path)


def _error_in(body: str) -> str:
    """What is wrong with the rule or terminal ``body``; empty if nothing is."""
    name = "content" if body.startswith("%json") else "CONTENT"
    error = llguidance.LLMatcher.validate_grammar(f"start: {name}\n{name}: {body}")
    return "" if error.startswith("WARNING") else error.strip().split("\n")[0]


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """The function tools among ``tools``."""
    found: list[Tool] = []
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise RequestError(f"{path} must be an object", param=path)
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise RequestError(f"{path}.function must be an object", param=f"{path}.function")
        path += ".function" if "function" in tool else ""
        key = "input_schema" if "input_schema" in function else "parameters"
        name, parameters = function.get("name"), function.get(key)
        if not isinstance(name, str) or not name:
            raise RequestError(f"{path}.name must be a string", param=f"{path}.name")
        if any(tool.name == name for tool in found):
            raise RequestError(f"{path}.name: {name!r} is declared twice", param=f"{path}.name")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, Mapping):
            raise RequestError(f"{path}.{key} must be a JSON Schema", param=f"{path}.{key}")
        found.append(Tool(name, parameters, bool(function.get("strict")), f"{path}.{key}"))
    return found


def _choice(tool_choice: str | Mapping[str, Any] | None) -> tuple[str, str | None]:
    """``none``, ``auto`` or ``required``, and the function's name where one is chosen."""
    if tool_choice is None:
        return "auto", None
    kind: object = tool_choice if isinstance(tool_choice, str) else tool_choice.get("type")
    if kind in ("none", "auto", "required"):
        return str(kind), None
    if kind == "any":
        return "required", None
    if kind in ("function", "tool") and isinstance(tool_choice, Mapping):
        function = tool_choice.get("function", tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return "required", name
    raise RequestError(f"tool_choice: {tool_choice!r} is not a choice", param="tool_choice")
