"""Which field of a refused request body is at fault.

``deepseek-recipe`` says what is wrong but, for types and missing fields, not where. This module
finds out by asking it again about parts of the body, so that it needs no second copy of the
schema: a field is to blame if the body fails because of it alone. The search has a budget, so
that a wrong body costs little more than a right one; when it is spent, the path so far must do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import deepseek_recipe as recipe

from rorqual.protocol.dialects import DIALECTS, Protocol

_MAX_DEPTH = 8
_MAX_KEYS = 64
_BUDGET = 2_000_000
_PROBE_COST = 10_000
"""A search may cost ``_BUDGET``; a question about a part costs this much and its size."""
_MAX_PROBE_SIZE = 65_536
"""Characters of the largest part asked about."""
_MAX_TEXT = 256
"""Characters kept of a string: its length has no influence on the shape."""
_SHAPE_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)
"""What the recipe raises for a body of the wrong shape."""
_MENTION = {"role": "user", "content": "json"}
"""A message with the word a JSON format wants to see."""
_NAMED = re.compile(r"Invalid '([^']+)'|Invalid (\w+)(?: and \w+)? value")
_PATH = re.compile(r"((?:messages|tools|input|system)\b[\w.\[\]]*): ")
_MISSING = re.compile(r"missing field `(\w+)`")
_SUBJECTS = (
    ("API model names", "model"),
    ("response_format", "response_format"),
    ("tool_choice", "tool_choice"),
    ("stream_options", "stream_options"),
    ("Stop string", "stop"),
    ("Required properties", "tools"),
    ("schema for function", "tools"),
    ("text.format", "text.format"),
    ("prefix set true", "messages"),
    ("tool", "messages"),
    ("reasoning_content", "messages"),
    ("must be passed back", "messages"),
    ("Input items", "input"),
    ("Either input", "input"),
    ("messages", "messages"),
)
"""What a conversion error talks about, most specific first."""


def blame_text(message: str, history: str = "messages") -> str | None:
    """The field a conversion error's words name, or None; ``history`` holds the conversation."""
    if match := _PATH.match(message):
        return match[1]
    if match := _NAMED.search(message):
        return match[1] or match[2]
    param = next((param for words, param in _SUBJECTS if words in message), None)
    return history if param == "messages" else param


def blame(body: Mapping[str, Any], message: str, protocol: Protocol = "chat") -> str | None:
    """Dotted path, such as ``messages[2].content``, of the field whose type or absence makes the
    recipe refuse ``body`` with ``message``; None if it cannot be told."""
    search = _Search(protocol)
    with contextlib.suppress(_SpentError):
        search.run({key: _shortened(value, _MAX_DEPTH) for key, value in body.items()})
    if search.path:
        return search.path
    missing = _MISSING.search(message)
    return missing[1] if missing else None


def blame_schema(
    body: Mapping[str, Any], message: str, protocol: Protocol, options: recipe.ConversionOptions
) -> str | None:
    """Path of the tool or answer format whose schema the recipe refuses with ``message``, which
    names at most a function; None if it is neither."""
    dialect = DIALECTS[protocol]
    rest = {"model": body.get("model"), dialect.history: [_MENTION]}

    def is_refused(part: Mapping[str, Any]) -> bool:
        try:
            dialect.request({**rest, **part}).convert(options)
        except (recipe.ConversionError, *_SHAPE_ERRORS) as error:
            return str(error) == message
        return False

    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if is_refused({"tools": [tool]}):
            return f"tools[{index}]"
    fields = ("response_format", "text", "output_config")
    return next((f for f in fields if f in body and is_refused({f: body[f]})), None)


def blame_surrogate(value: Any) -> str | None:
    """Path of a text in a JSON value that holds half of a surrogate pair, or whose name does;
    None if there is none."""
    left = [("", value)]
    while left:
        path, item = left.pop()
        if isinstance(item, str) and not _is_unicode(item):
            return path or "the body"
        if isinstance(item, list):
            left += ((f"{path}[{index}]", part) for index, part in enumerate(item))
        elif isinstance(item, dict):
            if not all(map(_is_unicode, item)):
                return path or "the body"
            left += ((f"{path}.{key}" if path else key, part) for key, part in item.items())
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _SpentError(Exception):
    """The budget is spent."""


class _Search:
    """One search for the field at fault; ``path`` is as far as it came."""

    def __init__(self, protocol: Protocol) -> None:
        self.path = ""
        self._dialect = DIALECTS[protocol]
        self._budget = _BUDGET

    def run(self, body: Mapping[str, Any]) -> None:
        """Follow the first field that fails beside an otherwise minimal body."""
        base = dict(self._dialect.smallest)
        errors = {key: self._failure({**base, key: value}) for key, value in body.items()}
        failing = [key for key, error in errors.items() if error]
        if not failing:  # then it is the one too large to ask about, if there is only one
            failing = [key for key, error in errors.items() if error == ""]
            if len(failing) != 1:
                return
        self.path = key = failing[0]
        self._enter(body[key], lambda part: {**base, key: part}, errors[key] or "", _MAX_DEPTH)

    def _enter(self, value: Any, wrap: Callable[[Any], Any], error: str, depth: int) -> None:
        """Extend the path below ``value`` to what makes ``wrap(value)`` fail with ``error``,
        which is empty where only elimination says that it does.
        """
        missing = _MISSING.search(error)
        if depth > 0 and isinstance(value, list):

            def only(part: Any) -> Any:
                return wrap([part])

            if (found := self._first_failing(value, wrap)) is not None:
                index, again = found
                self.path += f"[{index}]"
                self._enter(value[index], only, again, depth - 1)
                return
        elif depth > 0 and isinstance(value, dict) and len(value) <= _MAX_KEYS:
            # Tags last: without its tag an object fails in another way, whatever was wrong.
            for key in sorted(value, key=lambda name: name in ("role", "type")):
                part = value[key]
                if missing and not isinstance(part, dict | list):
                    continue
                others = {name: item for name, item in value.items() if name != key}
                without = self._failure(wrap(others))
                is_measured = without is None or f"missing field `{key}`" in without
                if without != error if error else is_measured:

                    def within(part: Any, key: str = key) -> Any:
                        return wrap({**value, key: part})

                    self.path += f".{key}"
                    self._enter(part, within, error, depth - 1)
                    return
        if missing:
            self.path += f".{missing[1]}"

    def _first_failing(
        self, items: list[Any], wrap: Callable[[Any], Any]
    ) -> tuple[int, str] | None:
        """Index and error of the first item that fails alone: groups first, then by halves.

        Or of the only item too large to ask about, with an empty error.
        """
        begin, too_large = 0, []
        while begin < len(items):
            end, size = begin + 1, _size(items[begin])
            while end < len(items) and (size := size + _size(items[end])) <= _MAX_PROBE_SIZE // 2:
                end += 1
            if not (error := self._failure(wrap(items[begin:end]))):
                too_large += [begin] if error == "" else []
                begin = end
                continue
            while end - begin > 1:
                middle = (begin + end) // 2
                if self._failure(wrap(items[begin:middle])):
                    end = middle
                else:
                    begin = middle
            error = self._failure(wrap([items[begin]]))
            return (begin, error) if error else None
        return (too_large[0], "") if len(too_large) == 1 else None

    def _failure(self, body: Any) -> str | None:
        """The recipe's complaint about the shape of ``body``; None if it has none, empty if
        ``body`` is too large to ask.

        Raises _SpentError.
        """
        size = _size(body)
        self._budget -= _PROBE_COST + min(size, _MAX_PROBE_SIZE)
        if self._budget < 0:
            raise _SpentError
        if size > _MAX_PROBE_SIZE:
            return ""
        try:
            self._dialect.request(body)
        except _SHAPE_ERRORS as error:
            return str(error) or type(error).__name__
        return None


def _shortened(value: Any, depth: int) -> Any:
    """``value`` with its long strings cut, unless they are not valid Unicode."""
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        return value[:_MAX_TEXT] if _is_unicode(value) else value
    if depth > 0 and isinstance(value, list):
        return [_shortened(item, depth - 1) for item in value]
    if depth > 0 and isinstance(value, dict):
        return {key: _shortened(item, depth - 1) for key, item in value.items()}
    return value


def _size(value: Any) -> int:
    """About the characters of ``value`` as JSON; stops counting above ``_MAX_PROBE_SIZE``."""
    size, left = 0, [value]
    while left and size <= _MAX_PROBE_SIZE:
        item = left.pop()
        size += 4
        if isinstance(item, str | list | dict):
            size += len(item)
        if size > _MAX_PROBE_SIZE:
            break
        if isinstance(item, list):
            left += item
        elif isinstance(item, dict):
            left += item
            left += item.values()
    return size
