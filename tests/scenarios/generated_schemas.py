"""Random tools with JSON Schemas of the kinds clients send."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

_WORDS = (
    "city",
    "$filter",
    "unit-id",
    "max_results",
    "名前",
    "a b",
    "x.y",
    'q"t',
    "path",
    "options",
)


def tool(rng: random.Random, name: str, *, strict: bool = False) -> dict[str, Any]:
    """A Chat Completions function tool."""
    names = rng.sample(_WORDS, rng.randint(0, 5))
    properties = {name: value_schema(rng, 2) for name in names}
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": names if strict else rng.sample(names, rng.randint(0, len(names))),
        "$defs": {"node": _NODE},
    }
    if strict or rng.random() < 0.5:
        parameters["additionalProperties"] = False
    return {
        "type": "function",
        "function": {"name": name, "strict": strict, "parameters": parameters},
    }


_NODE: Mapping[str, Any] = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["id"],
    "additionalProperties": False,
}


def value_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of any kind of value, containers nested at most ``depth`` deep."""
    kinds = [_string, _string, _number, _choice, _reference, _nullable]
    return rng.choice([*kinds, _array, _object, _union] if depth else kinds)(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "description": 'Says "what".'},
            {"type": "string", "minLength": 2, "maxLength": 9},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
            {"type": "string", "pattern": "[0-9]{2}"},
            {"type": "string", "format": "date"},
            {
                "type": "string",
                "enum": ["red", "re", "</b>", 'say "hi"', "", "line\nbreak", "日本"],
            },
        ]
    )


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "integer", "minimum": -3, "maximum": 40},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
            {"type": "boolean"},
        ]
    )


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"enum": ["on", 1, None, {"a": [1]}]}, {"const": "fixed"}, {"const": 7}])


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": ["string", "null", "integer"], "maxLength": 4, "maximum": 9}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/node"}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "items": value_schema(rng, depth - 1), "minItems": 1, "maxItems": 3}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, 2)
    return {
        "type": "object",
        "properties": {name: value_schema(rng, depth - 1) for name in names},
        "required": names[:1],
        "additionalProperties": False,
    }


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [value_schema(rng, depth - 1), {"type": "string"}, {"type": "null"}]}
