"""One tool call at a time and the answer from its result.

The functions are in ``tool_families``; some results are errors. Held-out split, by construction:
``is_held_out`` reserves one combination of (family, argument values) in ten.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any

from rorqual.errors import TrainingError
from rorqual.train.conversation import Dialogue, Turn
from rorqual.train.documents import Split
from rorqual.train.tool_families import FAMILIES, Arguments, Family

_HELD_OUT_ONE_IN = 10
_MAX_DRAWS = 5000
"""Attempts at arguments of the wanted split; the poorest family needs ten on average."""

_ERRORS = ("not found", "no access", "time out", "service closed", "bad request")

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Use the tools when they help.",
    "You are Rorqual, an assistant that uses tools.",
    "Be short.",
)


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """A family with its names drawn."""

    family: Family
    name: str
    parameter_names: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        properties = {
            name: {"type": parameter.kind}
            for name, parameter in zip(self.parameter_names, self.family.parameters, strict=True)
        }
        return {
            "name": self.name,
            "description": self.family.description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(self.parameter_names),
            },
        }


def is_held_out(family: Family, values: Arguments) -> bool:
    """Whether these arguments of this family are reserved for evaluation; a fixed hash."""
    text = f"{family.names[0]}|{json.dumps(values, sort_keys=True)}".lower()
    return zlib.crc32(text.encode()) % _HELD_OUT_ONE_IN == 0


def make_tools(rng: Random, count: int) -> tuple[dict[str, Any], ...]:
    """``count`` declared function objects of different families."""
    return tuple(tool.schema() for tool in _declare(rng, count))


def make_dialogue(
    rng: Random, *, num_requests: int, split: Split, think: bool | None = None
) -> Dialogue:
    """One to three declared tools and ``num_requests`` rounds of request, call, result, answer."""
    declared = _declare(rng, rng.choice((1, 2, 2, 3, 3)))
    if think is None:
        think = rng.random() < 0.5
    turns: list[Turn] = []
    for _ in range(num_requests):
        turns += _round(rng, rng.choice(declared), split)
    return Dialogue(
        task="tool",
        think=think,
        turns=tuple(turns),
        system=rng.choice(_SYSTEMS) if rng.random() < 0.5 else "",
        tools=tuple(tool.schema() for tool in declared),
    )


def _declare(rng: Random, count: int) -> list[_Declared]:
    return [
        _Declared(
            family=family,
            name=rng.choice(family.names),
            parameter_names=tuple(rng.choice(p.names) for p in family.parameters),
        )
        for family in rng.sample(FAMILIES, count)
    ]


def draw_arguments(rng: Random, family: Family, split: Split) -> Arguments:
    """Argument values of the wanted split. Raises TrainingError for a family that has none."""
    for _ in range(_MAX_DRAWS):
        values = {p.key: p.value(rng) for p in family.parameters}
        if is_held_out(family, values) == (split == "held-out"):
            return values
    raise TrainingError(f"the tool family {family.names[0]!r} has no {split} arguments")


def _round(rng: Random, tool: _Declared, split: Split) -> tuple[Turn, Turn]:
    family = tool.family
    values = draw_arguments(rng, family, split)
    shown = {
        key: ("on" if value else "off") if isinstance(value, bool) else value
        for key, value in values.items()
    }
    arguments = {
        name: values[parameter.key]
        for name, parameter in zip(tool.parameter_names, family.parameters, strict=True)
    }
    spoken = " and ".join(f"{name} {json.dumps(v).strip(chr(34))}" for name, v in arguments.items())
    call = Turn(
        kind="call",
        user=rng.choice(family.requests).format(**shown),
        content="",
        reasoning=f"I call {tool.name} with {spoken}.",
        call_name=tool.name,
        call_arguments=arguments,
    )
    if rng.random() < 0.06:
        error = rng.choice(_ERRORS)
        result: Arguments = {"error": error}
        text = f"The tool reported an error: {error}."
        thought = f"The tool failed: {error}."
    else:
        result = family.result(rng)
        text = rng.choice(family.answers).format(**{**shown, **result})
        thought = (
            "The result has "
            + " and ".join(
                f"{key} {json.dumps(value).strip(chr(34))}" for key, value in result.items()
            )
            + "."
        )
    return call, Turn(kind="result", user=json.dumps(result), content=text, reasoning=thought)
