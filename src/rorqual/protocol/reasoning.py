"""What a request says about its reasoning, in whichever dialect it says it.

Clients switch thinking on and off with ``thinking.type``, choose how hard with an effort word in
one of three places, name a mode as a suffix of the model's name, and bound it in tokens. All of
it ends here as one level of ``EFFORTS``, one budget and one reserve, or in an error that names the
two fields which contradict each other. What the budget does to an answer is the engine's side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rorqual.errors import RequestError
from rorqual.protocol.modes import EFFORTS, Generation, Level, Mode, level_of_mode

_EFFORT_FIELDS = ("reasoning_effort", "output_config.effort", "reasoning.effort")
_BUDGET_FIELDS = ("thinking.budget_tokens", "reasoning.budget_tokens", "reasoning.max_tokens")
_RESERVE_FIELDS = ("thinking.reserve_tokens", "reasoning.reserve_tokens")
_KINDS = ("enabled", "disabled", "adaptive")
_MAX_TOKENS = 2**31
LARGEST_RESERVE = 8192
"""Tokens of an answer that are kept free of reasoning where the client says nothing, at most."""


class Reasoning(NamedTuple):
    """What was asked for."""

    level: Level
    budget_tokens: int | None
    """Most tokens of reasoning; None: no limit was named."""
    reserve_tokens: int | None
    """Tokens of ``max_tokens`` that reasoning must leave; None: the default share."""

    def limit(self, max_tokens: int) -> int | None:
        """Most tokens of reasoning in an answer of ``max_tokens``; None without a limit.

        One more token closes the reasoning. Without other wishes a quarter of the answer, between
        1 and ``LARGEST_RESERVE`` tokens, is kept for what comes after it.
        """
        if self.level.mode == "non-think":
            return None
        reserve = self.reserve_tokens
        if reserve == 0 and self.budget_tokens is None:
            return None
        if reserve is None:
            reserve = min(max(max_tokens // 4, 1), LARGEST_RESERVE)
        room = max(max_tokens - reserve - 1, 0)
        return room if self.budget_tokens is None else min(self.budget_tokens, room)


def asked_reasoning(
    fields: Mapping[str, Any],
    generation: Generation,
    default: Mode,
    suffix: Mode | None = None,
    *,
    effort_is_independent: bool = False,
) -> Reasoning | None:
    """The one meaning of a body's reasoning fields; None if one is malformed.

    Args:
        default: the mode of requests that name none.
        suffix: the mode the model's name ends in, if it does.
        effort_is_independent: an effort beside disabled thinking is no contradiction but idle, as
            in Anthropic's API, where effort is about more than thinking.

    Raises:
        RequestError: two fields contradict each other, or a token count is none.
    """
    table = EFFORTS[generation]
    kind = _at(fields, "thinking.type")
    efforts = {path: word for path in _EFFORT_FIELDS if (word := _at(fields, path)) is not None}
    if malformed_field(fields, generation) is not None:
        return None
    budget_field, budget = _count(fields, _BUDGET_FIELDS)
    _, reserve = _count(fields, _RESERVE_FIELDS)
    if effort_is_independent and kind == "disabled":
        efforts = {}

    levels = {path: table[word] for path, word in efforts.items()}
    if suffix is not None:
        levels["model"] = level_of_mode(generation, suffix)
    wants = {path: level.mode != "non-think" for path, level in levels.items()}
    if kind is not None:
        wants["thinking.type"] = kind != "disabled"
    if budget is not None:
        wants[budget_field] = True
    on = [path for path, thinks in wants.items() if thinks]
    off = [path for path, thinks in wants.items() if not thinks]
    if on and off:
        raise RequestError(
            f"{on[0]} asks for thinking and {off[0]} turns it off; send only one of them",
            param=on[0],
        )
    modes = {level.mode: path for path, level in levels.items()}
    if len(modes) > 1:
        said = " and ".join(f"{path} asks for {mode}" for mode, path in modes.items())
        raise RequestError(f"{said}; send only one of them", param=next(iter(modes.values())))
    if levels:
        level = next(iter(levels.values()))
    elif off:
        level = table["none"]
    else:
        level = level_of_mode(generation, "think" if on and default == "non-think" else default)
    return Reasoning(level, budget, reserve)


def malformed_field(fields: Mapping[str, Any], generation: Generation) -> str | None:
    """Path of the first reasoning field whose value means nothing; None if there is none."""
    for name in ("thinking", "output_config", "reasoning"):
        if not isinstance(fields.get(name), dict | None):
            return name
    kind = _at(fields, "thinking.type")
    if fields.get("thinking") is not None and kind not in _KINDS:
        return "thinking.type"
    for path in _EFFORT_FIELDS:
        word = _at(fields, path)
        if word is not None and not (isinstance(word, str) and word in EFFORTS[generation]):
            return path
    return None


def _at(fields: Mapping[str, Any], path: str) -> Any:
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _count(fields: Mapping[str, Any], paths: tuple[str, ...]) -> tuple[str, int | None]:
    found = {path: value for path in paths if (value := _at(fields, path)) is not None}
    for path, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_TOKENS:
            raise RequestError(f"Invalid {path} value, it must be a token count >= 0", param=path)
    if len(set(found.values())) > 1:
        raise RequestError(f"{' and '.join(found)} differ; send only one", param=next(iter(found)))
    return next(iter(found.items()), ("", None))
