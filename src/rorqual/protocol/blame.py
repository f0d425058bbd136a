"""Which field of a refused request body is at fault.

``deepseek-recipe`` says what is wrong but, for types and missing fields, not where. This module
finds out by asking it again about parts of the body, so that it needs no second copy of the
schema: a field is to blame if the body fails because of it alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import deepseek_recipe as recipe

_MAX_DEPTH = 8
_MAX_KEYS = 64
_MAX_ITEMS = 10_000
_NAMED = re.compile(r"Invalid '([^']+)'|Invalid (\w+)(?: and \w+)? value")
_MISSING = re.compile(r"missing field `(\w+)`")
_SUBJECTS = (
    ("API model names", "model"),
    ("response_format", "response_format"),
    ("tool_choice", "tool_choice"),
    ("stream_options", "stream_options"),
    ("Stop string", "stop"),
    ("Required properties", "tools"),
    ("tool", "messages"),
    ("reasoning_content", "messages"),
    ("messages", "messages"),
)
"""What a conversion error talks about, most specific first."""


def blame_text(message: str) -> str | None:
    """The field a conversion error's own words name, or None."""
    if match := _NAMED.search(message):
        return match[1] or match[2]
    return next((param for words, param in _SUBJECTS if words in message), None)


def blame(body: Mapping[str, Any]) -> str | None:
    """Dotted path, such as ``messages[2].content``, of the field whose type or absence makes the
    recipe refuse ``body``; None if it cannot be told."""
    base: dict[str, Any] = {"model": "", "messages": []}
    for key, value in body.items():

        def alone(part: Any, key: str = key) -> dict[str, Any]:
            return {**base, key: part}

        if (error := _failure(alone(value))) is not None:
            return key + _inside(value, alone, error, _MAX_DEPTH)
    missing = _MISSING.search(_failure(body) or "")
    return missing[1] if missing else None


def _inside(value: Any, wrap: Callable[[Any], Any], error: str, depth: int) -> str:
    """Path below ``value`` to what makes ``wrap(value)`` fail with ``error``; may be empty."""
    missing = _MISSING.search(error)
    if depth > 0 and isinstance(value, list):
        for index, item in enumerate(value[:_MAX_ITEMS]):

            def alone(part: Any) -> Any:
                return wrap([part])

            if (again := _failure(alone(item))) is not None:
                return f"[{index}]" + _inside(item, alone, again, depth - 1)
    elif depth > 0 and isinstance(value, dict) and len(value) <= _MAX_KEYS:
        # Tags last: without its tag an object fails in another way, whatever was wrong with it.
        for key in sorted(value, key=lambda name: name in ("role", "type")):
            part = value[key]
            if missing and not isinstance(part, dict | list):
                continue
            others = {name: item for name, item in value.items() if name != key}
            if _failure(wrap(others)) != error:

                def within(part: Any, key: str = key) -> Any:
                    return wrap({**value, key: part})

                return f".{key}" + _inside(part, within, error, depth - 1)
    return f".{missing[1]}" if missing else ""


def _failure(body: Any) -> str | None:
    """The recipe's complaint about the shape of ``body``, or None."""
    try:
        recipe.ChatCompletionRequest(body)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return str(error)
    return None
