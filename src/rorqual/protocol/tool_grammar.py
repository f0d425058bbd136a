"""Declared tools to the Lark grammar of the DSML blocks that call them.

Per call: a declared name, then the tool's parameters in any order, each once, the required ones
all there. A string is written raw (``string="true"``), any other value as JSON; what of a schema
cannot be said about a raw string is said in JSON form instead. DSML: section 5.3 of the V4 fact
sheet. Nothing here knows tokens but the id of ``｜DSML｜``.

Of a parameters object's own keywords these are enforced: ``properties``, ``required``,
``additionalProperties``, ``$ref``, ``allOf``, ``anyOf`` and ``oneOf`` (as ``anyOf``); below a
parameter, what ``llguidance`` can. Unless the tool is strict, the rest is left to the tool.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeGuard

from rorqual.errors import RequestError
from rorqual.protocol.grammars import GrammarError
from rorqual.protocol.schema_text import (
    ANNOTATIONS,
    Schema,
    is_open,
    json_rule,
    literal,
    raw_string,
    resolved,
    without_patterns,
)
from rorqual.protocol.tokenizer import DSML

MAX_CALLS: Final = 64
"""Calls in one block, however many the client allows."""

_NUM_BITS = 56
"""Parameters told apart; llguidance has 64 bits, and these leave room for a counter."""
_EXTRA = f"[{_NUM_BITS}:{_NUM_BITS + 4}]"
_MAX_EXTRA = 15
_MAX_SHAPES = 32
_MAX_ALTERNATIVES = 512
"""Of one parameter that are told apart; with more, strings are written in JSON form too."""
_MAX_CHARS = 16 * 1024 * 1024
"""Of the values' rules of one block: each that refers to others takes its whole schema along."""
_FLAG, _RAW, _JSON = literal('" string="'), literal('true">'), literal('false">')
_SHAPE_KEYS = frozenset(
    ("type", "properties", "required", "additionalProperties", "allOf", "anyOf", "oneOf", "$ref")
)


class Tool(NamedTuple):
    """One declared function."""

    name: str
    parameters: Mapping[str, Any]
    """JSON Schema of its arguments."""
    strict: bool
    path: str
    """Where the request declares the schema, for errors."""


@dataclass(frozen=True)
class _Shape:
    """One object the arguments may be."""

    properties: dict[str, Schema] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    extra: Schema | None = None
    """What undeclared parameters must be; False: there may be none; None: nothing was said."""


class BlockGrammar:
    """The rules of a DSML block; ``inside``, ``after_marker`` and ``whole`` are expressions."""

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        dsml_id: int,
        spaced_tags: bool,
        max_calls: int,
        compiles: Callable[[str], object],
    ) -> None:
        """
        Args:
            tools: at least one.
            dsml_id: the token ``｜DSML｜``.
            spaced_tags: V4.1's spelling of the tags.
            max_calls: 1 to ``MAX_CALLS``.
            compiles: raises GrammarError on a Lark grammar that cannot be used.

        Raises:
            RequestError: a schema is malformed or, where strict, cannot be enforced.
        """
        space = " " if spaced_tags else ""
        block = f"{space}calls" if spaced_tags else "tool_calls"
        self._marker = f"<[{dsml_id}]>"
        self._invoke = f"{space}invoke"
        self._parameter = f"{space}parameter"
        self._empty = "\n" if spaced_tags else ""
        self._compiles = compiles
        self._rules: list[str] = []
        self._values: dict[str, str] = {}
        self._num_chars = 0
        functions = " | ".join(self._function(tool) for tool in tools)
        self._rule("call", f"{self._open(self._invoke)} ({functions})")
        end = self._close(block)
        self._rule("calls::_", r'call "\n" more_calls::incr([0:8])')
        self._rule("more_calls::_", f"{end}\n    | calls::_ %if lt([0:8], {max_calls})")
        self.inside = "calls::0x0"
        opened = literal(f"{block}>\n")
        self.after_marker = f"{opened} {self.inside}"
        self.whole = f'"\\n\\n<" {self._marker} {self.after_marker}'

    @property
    def rules(self) -> str:
        """Lark text of the rules the expressions need."""
        return "\n".join(self._rules)

    def _rule(self, name: str, body: str) -> None:
        self._rules.append(f"{name}: {body}")

    def _open(self, tag: str) -> str:
        """From ``<`` to the opening quote of the tag's name."""
        rest = literal(f'{tag} name="')
        return f'"<" {self._marker} {rest}'

    def _close(self, tag: str) -> str:
        """The whole closing tag."""
        return f'"</" {self._rest_of_closing(tag)}'

    def _rest_of_closing(self, tag: str) -> str:
        """A closing tag after its ``</``."""
        return f"{self._marker} {literal(f'{tag}>')}"

    def _function(self, tool: Tool) -> str:
        """Rule from after ``name="`` to the invocation's closing tag."""
        at = sum(rule.startswith("tool") for rule in self._rules)
        shapes = _shapes(tool.parameters, tool, {})
        rules = []
        for shape in shapes:
            number = len(self._rules)
            rules.append(f"args{number}")
            self._arguments(shape, tool, number)
        name = literal(f'{tool.name}">\n')
        self._rule(f"tool{at}", f"{name} ({' | '.join(rules)})")
        return f"tool{at}"

    def _arguments(self, shape: _Shape, tool: Tool, number: int) -> None:
        """Rules for the parameters of ``shape``, any order, each once."""
        extra = shape.extra
        if extra is None:  # an object nothing is said about is open; a described one is not
            extra = not shape.properties and not tool.strict
        # Required ones first: they need a bit each.
        names = sorted(shape.properties, key=lambda name: name not in shape.required)
        undeclared = sorted(shape.required - set(names))
        if undeclared and extra is False:
            raise RequestError(
                f"{tool.path}.required: {undeclared[0]!r} is not among the properties",
                param=f"{tool.path}.required",
            )
        names = undeclared + names
        if len(shape.required) > _NUM_BITS:
            raise RequestError(
                f"{tool.path}.required: more than {_NUM_BITS} required parameters",
                param=f"{tool.path}.required",
            )
        choices: list[str] = []
        for bit, name in enumerate(names):
            schema = shape.properties.get(name, extra)
            path = f"{tool.path}.properties.{name}"
            value = self._parameter_value(name, schema, tool, path)
            if value is None:
                if name in shape.required:
                    raise RequestError(f"{path}: required, but no value is valid", param=path)
                continue
            if bit < _NUM_BITS:
                choices.append(f"{value} next{number}::set_bit({bit}) %if bit_clear({bit})")
            else:
                choices.append(f"{value} next{number}::_")
        room = [f"bit_clear({bit})" for bit in range(min(len(names), _NUM_BITS))]
        if extra is not False and (value := self._undeclared(names, extra, tool)) is not None:
            room.append(f"lt({_EXTRA}, {_MAX_EXTRA})")
            choices.append(f"{value} next{number}::incr({_EXTRA}) %if {room[-1]}")
        done = [f"bit_set({bit})" for bit, name in enumerate(names) if name in shape.required]
        end = self._close(self._invoke)
        start = [] if done else [f"{literal(self._empty)} {end}"]
        if choices:
            more = f"{self._open(self._parameter)} pick{number}::_"
            self._rule(f"pick{number}::_", "\n    | ".join(choices))
            ending = f"{end}{' %if ' + _nested('and', done) if done else ''}"
            if_room = "" if len(names) > _NUM_BITS else f" %if {_nested('or', room)}"
            self._rule(f"more{number}::_", f"{more}{if_room}")
            self._rule(f"next{number}::_", f'"\\n" rest{number}::_')
            self._rule(f"rest{number}::_", f"{ending}\n    | more{number}::_")
            start.append(f"more{number}::0x0")
        self._rule(f"args{number}", " | ".join(start))

    def _parameter_value(
        self, name: str, schema: Schema | None, tool: Tool, path: str
    ) -> str | None:
        """From the parameter's name to its closing tag; None if no value is valid."""
        flags = self._flags(schema, tool, path)
        start = literal(f'{_written(name)}" string="')
        return f"{start} {flags} {self._rest_of_closing(self._parameter)}" if flags else None

    def _undeclared(self, names: Sequence[str], schema: Schema | None, tool: Tool) -> str | None:
        """A parameter under a name that is not declared."""
        flags = self._flags(schema, tool, f"{tool.path}.additionalProperties")
        if not flags:
            return None
        taken = " | ".join(literal(_written(name)) for name in names)
        key = self._shared(
            "NAME", r'/[^"\\<>\s\x00-\x1F\x7F]{1,64}/' + (f" & ~({taken})" * bool(names))
        )
        return f"{key} {_FLAG} {flags} {self._rest_of_closing(self._parameter)}"

    def _flags(self, schema: Schema | None, tool: Tool, path: str) -> str:
        """From after ``string="`` to the ``</`` of the closing tag; empty if no value is valid."""
        raw, rest = _split(schema if schema is not None else True, tool.parameters)
        choices = []
        if raw:
            values = " | ".join(
                text if text.startswith('"') else self._shared("RAW", text)
                for text in dict.fromkeys(raw)
            )
            choices.append(f"{_RAW} ({values})")
        if rest is not False:
            value = self._shared("json", self._json(rest, tool, path))
            choices.append(f'{_JSON} {value} "</"')
        return f"({' | '.join(choices)})" if choices else ""

    def _json(self, schema: Schema, tool: Tool, path: str) -> str:
        """``%json`` text of ``schema``, without the patterns if it is only they that fail."""
        attempts = [schema] if tool.strict else [schema, without_patterns(schema)]
        reason = ""
        for attempt in attempts:
            try:
                text = json_rule(attempt, tool.parameters, lenient=not tool.strict)
                if text in self._values:
                    return text
                self._num_chars += len(text)
                if self._num_chars > _MAX_CHARS:
                    raise RequestError(f"{path}: the tools' schemas are too large", param=path)
                self._compiles(f"start: value\nvalue: {text}")
            except GrammarError as error:
                reason = reason or str(error)
            else:
                return text
        raise RequestError(f"{path}: cannot be enforced: {reason}", param=path)

    def _shared(self, prefix: str, body: str) -> str:
        """The rule with this body; equal values share one."""
        if body not in self._values:
            self._values[body] = f"{prefix}{len(self._values)}"
            self._rule(self._values[body], body)
        return self._values[body]


def _written(name: str) -> str:
    """A parameter's name as the model writes it.

    The official parser puts it between quotes as it stands, so JSON's escapes belong in it, and
    it ends a name at a blank.
    """
    text = json.dumps(name, ensure_ascii=False)[1:-1].replace('\\"', "\\u0022")
    return "".join(f"\\u{ord(char):04x}" if char in " <>｜" else char for char in text)


def _nested(operator: str, conditions: Sequence[str]) -> str:
    """``and(a, and(b, c))``: llguidance's operators take two."""
    *others, last = conditions
    for condition in reversed(others):
        last = f"{operator}({condition}, {last})"
    return last


def _split(schema: Schema, root: Mapping[str, Any]) -> tuple[list[str], Schema]:
    """Raw-string expressions, each ending in ``</``, and the schema of the values left for JSON
    (False: none)."""
    alternatives = _alternatives(schema, root)
    if alternatives is None:
        return [], schema
    parts = [_split_one(part, root) for part in alternatives]
    if len(parts) == 1:
        return parts[0]
    rest: list[Schema] = [part for _, part in parts if part is not False]
    raw = list(itertools.chain.from_iterable(raw for raw, _ in parts))
    return raw, {"anyOf": rest} if rest else False


def _alternatives(schema: Schema, root: Mapping[str, Any]) -> list[Schema] | None:
    """What nested ``anyOf`` and ``oneOf`` choose from; None if that is too much, or endless."""
    found: list[Schema] = []
    waiting = [schema]
    for _ in range(_MAX_ALTERNATIVES):
        part = resolved(waiting.pop(), root)
        keys = part.keys() - ANNOTATIONS if isinstance(part, Mapping) else set()
        if isinstance(part, Mapping) and keys in ({"anyOf"}, {"oneOf"}):
            waiting += reversed(part[next(iter(keys))])
        else:
            found.append(part)
        if not waiting:
            return found
        if len(waiting) > _MAX_ALTERNATIVES:
            return None
    return None


def _split_one(schema: Schema, root: Mapping[str, Any]) -> tuple[list[str], Schema]:
    """``_split`` of one alternative."""
    if isinstance(schema, bool):
        return ([raw_string({}) or ""], _NOT_STRING) if schema else ([], False)
    keys = schema.keys() - ANNOTATIONS
    if not keys:
        return _split_one(True, root)
    if keys <= {"type", "enum", "const"} and (keys & {"enum", "const"}):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list):
            return [], schema
        others = [value for value in values if not isinstance(value, str)]
        raw = [literal(value + "</") for value in values if isinstance(value, str)]
        if any(DSML in value for value in raw):
            return [], schema
        return raw, {**schema, "enum": others} if others else False
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or "string" not in types or not keys.isdisjoint(_COMBINING):
        return [], schema
    raw_text = raw_string(schema)
    if raw_text is None:
        return [], schema
    left = [kind for kind in types if kind != "string"]
    return [raw_text], {**schema, "type": left} if left else False


_NOT_STRING: Final[Mapping[str, Any]] = {"type": ["object", "array", "number", "boolean", "null"]}
_COMBINING = frozenset(("anyOf", "oneOf", "allOf", "not", "if", "$ref", "enum", "const"))


def _shapes(
    schema: Schema, tool: Tool, known: dict[int, list[_Shape]], depth: int = 8
) -> list[_Shape]:
    """The alternatives of a parameters schema.

    Args:
        known: results by identity of the schema, so that shared parts are read once.
    """
    path = tool.path
    schema = resolved(schema, tool.parameters)
    if isinstance(schema, bool):
        if not schema:
            raise RequestError(f"{path}: no arguments are valid", param=path)
        return [_Shape()]
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = [_Shape()]  # inside itself a schema says nothing new
    if not isinstance(schema, Mapping):
        raise RequestError(f"{path} must be a JSON Schema object", param=path)
    types = schema.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types or ()):
        raise RequestError(f"{path}.type must be 'object', got {types!r}", param=f"{path}.type")
    unknown = sorted(schema.keys() - ANNOTATIONS - _SHAPE_KEYS)
    if tool.strict and unknown:
        raise RequestError(
            f"{path}.{unknown[0]}: cannot be enforced on the arguments of a strict tool",
            param=f"{path}.{unknown[0]}",
        )
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise RequestError(f"{path}.properties must be an object", param=f"{path}.properties")
    for name, value in properties.items():
        if not isinstance(value, Mapping | bool):
            where = f"{path}.properties.{name}"
            raise RequestError(f"{where} must be a JSON Schema", param=where)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError(f"{path}.required must be a list of names", param=f"{path}.required")
    extra = schema.get("additionalProperties")
    if extra is None and "patternProperties" in schema:
        extra = True
    extra = False if tool.strict else extra
    shapes = [_Shape(dict(properties), frozenset(required), extra)]
    parts = [[part] for part in schema.get("allOf", ())]
    parts += [list(schema[key]) for key in ("anyOf", "oneOf") if key in schema]
    for options in parts if depth else ():
        found = [shape for part in options for shape in _shapes(part, tool, known, depth - 1)]
        if len(found) * len(shapes) > _MAX_SHAPES:
            continue
        shapes = [_merged(one, other) for one in shapes for other in found]
    known[id(schema)] = shapes
    return shapes


def _merged(one: _Shape, other: _Shape) -> _Shape:
    """What is both."""
    properties = dict(one.properties)
    for name, schema in other.properties.items():
        same = name not in properties or is_open(properties[name])
        properties[name] = schema if same else _both(properties[name], schema)
    extras = [extra for extra in (one.extra, other.extra) if extra is not None]
    extra = False if False in extras else extras[0] if extras else None
    return _Shape(properties, one.required | other.required, extra)


def _both(one: Schema, other: Schema) -> Schema:
    """The values both allow, flat, so that what many alternatives share is said once."""
    parts = {
        id(part): part
        for schema in (one, other)
        for part in (schema["allOf"] if _is_conjunction(schema) else [schema])
    }
    return {"allOf": list(parts.values())} if len(parts) > 1 else one


def _is_conjunction(schema: Schema) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(schema, Mapping) and schema.keys() == {"allOf"}
