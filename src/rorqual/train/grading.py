"""Verdicts on answers, and counts of them with confidence intervals. Pure functions of text.

An evidence answer reads ``"<sentence>"``, an empty line, ``Answer: <value>``. A tool call is well
formed when its markup is complete as the template writes it and the served answer has it as a
call with JSON arguments; the parser alone would accept less.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.train.conversation import Turn
from rorqual.train.documents import ABSENT, Fact
from rorqual.train.served import Reply

_Z95 = 1.959964
_EVIDENCE = re.compile(r'"(?P<quote>.*)"\n\nAnswer: (?P<value>.*)', re.DOTALL)
_VALUE = "(?:(?!｜DSML｜).)*"
_PARAMETER = (
    rf'<｜DSML｜parameter name="[^"]*" string="(?:true|false)">{_VALUE}</｜DSML｜parameter>\n'
)
_INVOKE = rf'<｜DSML｜invoke name="[^"]*">\n(?:{_PARAMETER})*</｜DSML｜invoke>\n'
_CALLS = re.compile(rf"\n\n<｜DSML｜tool_calls>\n(?:{_INVOKE})+</｜DSML｜tool_calls>", re.DOTALL)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}

Verdict = dict[str, bool]
"""Measure -> whether this answer meets it."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """``right`` of ``total`` answers with the 95 % Wilson score interval of the share."""

    right: int
    total: int

    @property
    def rate(self) -> float:
        """right / total; 0 of none."""
        return self.right / self.total if self.total else 0.0

    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; (0, 1) of none."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.rate
        weight = _Z95**2 / n
        middle = (p + weight / 2) / (1 + weight)
        half = _Z95 * math.sqrt(p * (1 - p) / n + weight / (4 * n)) / (1 + weight)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, float]:
        """``right``, ``total``, ``rate`` and the interval's ``low`` and ``high``."""
        low, high = (round(bound, 4) for bound in self.interval())
        return {
            "right": self.right,
            "total": self.total,
            "rate": round(self.rate, 4),
            "low": low,
            "high": high,
        }


def grade_evidence(answer: str, document: str, fact: Fact) -> Verdict:
    """``value`` exact; ``quote`` verbatim in the document; ``proven``: the right value after the
    quoted sentence that states it.
    """
    match = _EVIDENCE.fullmatch(answer)
    quote, value = (match["quote"], match["value"]) if match else ("", "")
    is_right = value == fact.value
    return {
        "value": is_right,
        "quote": bool(quote) and quote in document,
        "proven": is_right and quote == fact.sentence,
    }


def grade_absent(answer: str) -> Verdict:
    """``refused``: says that the document does not state it."""
    return {"refused": answer == ABSENT}


def grade_call(reply: Reply, wanted: Turn, tools: Sequence[dict[str, Any]]) -> Verdict:
    """``well_formed`` as the module says; ``fits_schema`` of a declared tool; ``correct`` call."""
    calls = [call["function"] for call in reply.message.get("tool_calls") or ()]
    text = reply.raw.rpartition("</think>")[2]
    arguments = [_json_object(call["arguments"]) for call in calls]
    well_formed = (
        reply.finish_reason == "tool_calls"
        and bool(calls)
        and None not in arguments
        and _CALLS.fullmatch(text) is not None
    )
    declared = {tool["name"]: tool["parameters"] for tool in tools}
    fits = well_formed and all(
        call["name"] in declared and _fits(given, declared[call["name"]])
        for call, given in zip(calls, arguments, strict=True)
    )
    correct = (
        well_formed
        and [call["name"] for call in calls] == [wanted.call_name]
        and _canonical(arguments[0]) == _canonical(wanted.call_arguments)
    )
    return {"well_formed": well_formed, "fits_schema": fits, "correct": correct}


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _fits(arguments: dict[str, Any] | None, schema: dict[str, Any]) -> bool:
    """Whether ``arguments`` are those ``schema`` lists, all of them, of the right JSON types."""
    properties = schema["properties"]
    if arguments is None or set(arguments) != set(properties):
        return False
    return all(
        isinstance(value, _JSON_TYPES[properties[name]["type"]])
        and (properties[name]["type"] == "boolean" or not isinstance(value, bool))
        for name, value in arguments.items()
    )


def _canonical(value: object) -> str:
    """JSON text: unlike ``==`` it tells 1, 1.0 and true apart."""
    return json.dumps(value, sort_keys=True)
