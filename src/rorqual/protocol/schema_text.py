"""JSON Schemas as pieces of Lark grammar text: JSON values, and strings written without quotes.

Pure functions. A schema is an object or a boolean, as JSON Schema has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import llguidance

from rorqual.protocol.grammars import GrammarError

Schema = Mapping[str, Any] | bool

ANNOTATIONS: Final = frozenset(
    [
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
        *("writeOnly", "nullable", "$schema", "$id", "$comment", "$defs", "definitions"),
    ]
)
"""Keywords that allow and forbid nothing."""

_JSON_OPTIONS: Final = {
    # Bounded: a model may fall in love with newlines.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}",
    # Without u: half of a surrogate pair is not text.
    "json_allowed_escapes": 'nrbtf\\"',
}
_MOST_INTEGER: Final = 9 * 10**18
"""Either way of zero, where a schema sets no bound. llguidance reads bounds as floating-point
numbers and must hold them in 64 bits, so this is the roundest that fits."""
_FINEST_NUMBER: Final = 1e-9
"""Where a schema bounds a number, and so rules out exponents, but not its decimals."""
_ROOT: Final = "root"
_MAX_ROUNDS: Final = 64
"""Of looking for endless parts; references that need more are taken to be sound."""
_CLOCK: Final = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
_ZONE: Final = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DATE: Final = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_FORMATS: Final[Mapping[str, str]] = {
    "date": _DATE,
    "time": _CLOCK + _ZONE,
    "date-time": f"{_DATE}T{_CLOCK}{_ZONE}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
"""The formats a raw string is held to; others are annotations, as JSON Schema has it."""


def literal(text: str) -> str:
    """``text`` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """A regular expression as a Lark terminal; it must match the whole text.

    Anchors around the whole say nothing new and are dropped; llguidance has none.
    """
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not _is_escaped(pattern, len(pattern) - 1):
        pattern = pattern[:-1]
    return f"/(?s:{_in_slashes(pattern)})/"


def json_rule(schema: Schema, root: Mapping[str, Any], *, lenient: bool) -> str:
    """``%json`` text of the values of ``schema``, whose references point into ``root``.

    Integers, and numbers with a bound, get the bounds they lack: a model may fall in love with a
    digit. Numbers without any may have exponents, which bounds would forbid, and stay endless.

    Args:
        lenient: skip keywords and formats llguidance does not know, rather than fail.

    Raises:
        GrammarError: a part of it is only a reference back to itself, which llguidance finds out
            when it gets there.
    """
    if has_endless_part(schema, root):
        raise GrammarError("a part of the schema is defined by nothing but itself")
    options = {**_JSON_OPTIONS, "lenient": lenient}
    if isinstance(schema, bool):
        return "%json " + json.dumps({"x-guidance": options, **({} if schema else {"enum": []})})
    text = json.dumps(schema)
    refers = '"$ref"' in text
    text += json.dumps(root) if refers else ""
    # Two that meet are multiplied, which may be more than llguidance can hold.
    finest = None if '"multipleOf"' in text else _FINEST_NUMBER

    def change(part: dict[str, Any]) -> dict[str, Any]:
        return _bounded(_moved_reference(part), finest)

    body = _mapped(schema, change)
    if refers:
        body["$defs"] = {_ROOT: _mapped(root, change)}
    return "%json " + json.dumps({"x-guidance": options, **body}, ensure_ascii=False)


def raw_string(schema: Mapping[str, Any]) -> str | None:
    """A terminal of the strings of ``schema`` without quotes, and ``</`` after them; None where
    only the JSON form can tell."""
    bounds = (schema.get("minLength", 0), schema.get("maxLength"))
    least, most = bounds
    parts: list[str] = []
    if least or most is not None:
        if not isinstance(least, int) or not isinstance(most, int | None):
            return None
        parts.append(f"(?s:.{{{least},{'' if most is None else most}}})")
    if (kind := schema.get("format")) in _FORMATS:
        parts.append(_FORMATS[cast("str", kind)])
    if "pattern" in schema:
        if (searched := _searched(schema["pattern"])) is None:
            return None
        parts.append(searched)
    # The lexeme takes its ending with it: only then can the text itself hold a "</".
    text = " & ".join(f"/(?s:{part})<\\//" for part in parts or [".*"])
    if "pattern" in schema and llguidance.LLMatcher.validate_grammar(f"start: RAW\nRAW: {text}"):
        return None
    return text


def resolved(schema: Schema, root: Mapping[str, Any]) -> Schema:
    """``schema``, or what it only refers to; itself if the reference leads nowhere."""
    target: Any = schema
    for _ in range(32):
        if not isinstance(target, Mapping) or target.keys() - ANNOTATIONS != {"$ref"}:
            break
        target = _target(target, root)
        if not isinstance(target, Mapping | bool):
            return schema
    return cast("Schema", target)


def has_endless_part(schema: Schema, root: Mapping[str, Any]) -> bool:
    """Whether ``schema`` holds a part that refers to itself before it says anything."""
    parts: list[Mapping[str, Any]] = []
    seen: set[int] = set()
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, Mapping) and id(part) not in seen:
            seen.add(id(part))
            parts.append(part)
            left += [target for target in (_target(part, root),) if target is not None]
            for key, value in part.items():
                if key in _OF_SCHEMAS and isinstance(value, Mapping):
                    left += () if key in _DEFINITIONS else value.values()
                elif key not in _DATA:
                    left.append(value)
    sound: set[int] = set()

    def is_sound(part: Any) -> bool:
        return not isinstance(part, Mapping) or id(part) in sound

    for _ in range(_MAX_ROUNDS):
        before = len(sound)
        for part in reversed(parts):  # what is inside comes first, as far as there is an order
            needed = [[_target(part, root)], *([other] for other in _items(part, "allOf"))]
            needed += [options for key in ("anyOf", "oneOf") if (options := _items(part, key))]
            if all(any(map(is_sound, options)) for options in needed):
                sound.add(id(part))
        if len(sound) in (before, len(parts)):
            return len(sound) < len(parts)
    return False


def _items(part: Mapping[str, Any], key: str) -> list[Any]:
    items = part.get(key)
    return items if isinstance(items, list) else []


def _target(part: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """What the reference in ``part`` leads to; None if there is none or it leads nowhere."""
    reference = part.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    target: Any = root
    for key in reference.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, Mapping) else None
    return target


def is_open(schema: Schema) -> bool:
    """Whether every value is valid, as far as the keywords alone tell."""
    return schema is True or (isinstance(schema, Mapping) and not schema.keys() - ANNOTATIONS)


def without_patterns(schema: Schema) -> Schema:
    """``schema`` with no regular expressions in it."""

    def change(part: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in part.items() if k not in ("pattern", "patternProperties")}

    return schema if isinstance(schema, bool) else _mapped(schema, change)


def _searched(pattern: object) -> str | None:
    """``pattern`` as one that matches whole texts; None where anchors make that difficult."""
    if not isinstance(pattern, str):
        return None
    begin, end = pattern.startswith("^"), pattern.endswith("$")
    end = end and not _is_escaped(pattern, len(pattern) - 1)
    inner = pattern[begin : len(pattern) - end]
    outside_classes = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", inner)
    if re.search(r"[$^]", outside_classes) or ((begin or end) and "|" in outside_classes):
        return None
    inner = _in_slashes(inner)
    return f"{'' if begin else '.*'}({inner}){'' if end else '.*'}"


def _in_slashes(pattern: str) -> str:
    """``pattern`` with JSON Schema's meaning of its classes, fit to stand between slashes."""
    return llguidance.regex_to_lark(pattern, "dw")


def _is_escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _bounded(part: dict[str, Any], finest: float | None) -> dict[str, Any]:
    """``part`` without numbers of endless length, as far as ``json_rule`` says; ``finest`` is the
    step of those with decimals."""
    types = part.get("type")
    types = types if isinstance(types, list) else [types]
    low = part.get("exclusiveMinimum", part.get("minimum"))
    high = part.get("exclusiveMaximum", part.get("maximum"))
    is_number, is_unbounded = "number" in types, low is None and high is None
    if part.keys() & {"enum", "const"} or (is_number and is_unbounded):
        return part
    if not is_number and "integer" not in types:
        return part
    added: dict[str, Any] = {"multipleOf": finest} if is_number and finest else {}
    if low is None and _is_between(high):
        added["minimum"] = -_MOST_INTEGER
    if high is None and _is_between(low):
        added["maximum"] = _MOST_INTEGER
    return {**added, **part}


def _is_between(bound: object) -> bool:
    """Whether there is room on both sides of a schema's ``bound``, if it has one."""
    return bound is None or (isinstance(bound, int | float) and abs(bound) < _MOST_INTEGER)


def _moved_reference(part: dict[str, Any]) -> dict[str, Any]:
    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        return {**part, "$ref": f"#/$defs/{_ROOT}{reference[1:]}"}
    return part


_OF_SCHEMAS: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_DEFINITIONS: Final = frozenset(("$defs", "definitions"))
_DATA: Final = frozenset(("enum", "const", "default", "examples", "example", "required", "type"))


def _mapped(
    schema: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """``schema`` with ``change`` applied to it and to every schema inside it."""

    def below(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _mapped(value, change)
        return [below(item) for item in value] if isinstance(value, list) else value

    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _OF_SCHEMAS and isinstance(value, Mapping):
            out[key] = {name: below(part) for name, part in value.items()}
        else:
            out[key] = value if key in _DATA else below(value)
    return change(out)
