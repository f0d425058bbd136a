"""Verdicts on answers, as a strict reader would give them."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import THINK_END, Tokenizer
from rorqual.train.attributes import PLACE_ATTRIBUTES
from rorqual.train.conversation import Dialogue, encode
from rorqual.train.documents import ABSENT, Fact
from rorqual.train.exam import tool_opening
from rorqual.train.grading import (
    Share,
    Verdict,
    grade_absent,
    grade_call,
    grade_evidence,
)
from rorqual.train.served import ChatModel, Reply, parse_reply
from rorqual.train.tool_use import make_dialogue

from .conftest import NANO, small_model
from .test_conversation import generated_text

FACT = Fact(
    entity="the old mill",
    attribute=PLACE_ATTRIBUTES[2],
    value="90 dollars",
    sentence="The price of the old mill is 90 dollars.",
)
OTHER = "The price of the new mill is 90 dollars."
DOCUMENT = f"{OTHER} {FACT.sentence} This part of the list is short."


@pytest.mark.parametrize(
    ("answer", "value", "quote", "proven"),
    [
        (f'"{FACT.sentence}"\n\nAnswer: 90 dollars', True, True, True),
        (f'"{OTHER}"\n\nAnswer: 90 dollars', True, True, False),
        (f'"{FACT.sentence}"\n\nAnswer: 91 dollars', False, True, False),
        (f'"{FACT.sentence}"\n\nAnswer: 90', False, True, False),
        ('"The price of the old mill is 91 dollars."\n\nAnswer: 90 dollars', True, False, False),
        (f'"{FACT.sentence[:-1]}"\n\nAnswer: 90 dollars', True, True, False),
        ('""\n\nAnswer: 90 dollars', True, False, False),
        (f"{FACT.sentence}\n\nAnswer: 90 dollars", False, False, False),
        (f'"{FACT.sentence}"\n\nAnswer: 90 dollars\n', False, True, False),
        ("90 dollars", False, False, False),
        (ABSENT, False, False, False),
        ("", False, False, False),
    ],
)
def test_evidence_is_graded_to_the_letter(
    answer: str, value: bool, quote: bool, proven: bool
) -> None:
    assert grade_evidence(answer, DOCUMENT, FACT) == {
        "value": value,
        "quote": quote,
        "proven": proven,
    }


def test_only_the_plain_refusal_counts_for_absent_facts() -> None:
    assert grade_absent(ABSENT) == {"refused": True}
    assert grade_absent(ABSENT + " ") == {"refused": False}
    assert grade_absent(f'"{FACT.sentence}"\n\nAnswer: 90 dollars') == {"refused": False}


# ---- tool calls --------------------------------------------------------------------------------
def dialogue_of(think: bool, name: str = "book_table") -> Dialogue:
    """One round with the wanted function, which takes an integer and a text."""
    for seed in range(500):
        found = make_dialogue(Random(seed), num_requests=1, split="held-out", think=think)
        if found.turns[0].call_name == name:
            return dataclasses.replace(found, system="")
    raise AssertionError(name)


def reply_with(tokenizer: Tokenizer, dialogue: Dialogue, text: str) -> Reply:
    """What a client gets when the model writes ``text``; template tokens by their spelling."""
    card = ModelCard.from_dir(NANO)
    chat = ChatModel(small_model(), tokenizer, card)
    messages = [*tool_opening(dialogue), {"role": "user", "content": dialogue.turns[0].user}]
    request = chat.render(
        messages,
        "think" if dialogue.think else "non-think",
        max_tokens=256,
        tools=dialogue.tools,
    )
    return parse_reply(tokenizer, request, ids_of(tokenizer, text), stopped=True)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ranges: list[tuple[int, int]] = []
    for token in ("｜DSML｜", THINK_END):
        at = text.find(token)
        while at >= 0:
            ranges.append((at, at + len(token)))
            at = text.find(token, at + 1)
    return tokenizer.encode_prompt(text, sorted(ranges))


def verdict_on(tokenizer: Tokenizer, dialogue: Dialogue, text: str) -> Verdict:
    reply = reply_with(tokenizer, dialogue, text)
    return grade_call(reply, dialogue.turns[0], dialogue.tools)


def right_text(dialogue: Dialogue) -> str:
    return generated_text(dialogue, 0).removesuffix("<｜end▁of▁sentence｜>")


def levels(verdict: Verdict) -> int:
    """0 nothing, 1 well formed, 2 and fits the schema, 3 and correct."""
    ladder = [verdict["well_formed"], verdict["fits_schema"], verdict["correct"]]
    assert ladder == sorted(ladder, reverse=True), verdict
    return sum(ladder)


@pytest.mark.parametrize("think", [False, True])
def test_the_right_call_is_correct(think: bool, tokenizer: Tokenizer) -> None:
    dialogue = dialogue_of(think)
    assert levels(verdict_on(tokenizer, dialogue, right_text(dialogue))) == 3


@pytest.mark.parametrize(
    ("change", "level"),
    [
        (lambda text, call: text.replace(f'"{call}"', '"book_flight"'), 1),
        (lambda text, call: text.replace(':', ':0', 1), 2),
        (lambda text, call: text.replace('string="false"', 'string="true"'), 1),
        (lambda text, call: text.replace("</｜DSML｜tool_calls>", ""), 0),
        (lambda text, call: text.replace("</｜DSML｜invoke>", ""), 0),
        (lambda text, call: text.replace("</｜DSML｜parameter>", "", 1), 0),
        (lambda text, call: text + " Done.", 0),
        (lambda text, call: "Sure." + text, 0),
        (lambda text, call: text + text, 0),
        (lambda text, call: "I have booked it.", 0),
        (lambda text, call: "", 0),
    ],
    ids=[
        "undeclared name", "other value", "wrong type", "block not closed", "call not closed",
        "parameter not closed", "text after", "text before", "two blocks", "no call", "nothing",
    ],
)  # fmt: skip
def test_faulty_calls_are_told_apart(change: Any, level: int, tokenizer: Tokenizer) -> None:
    dialogue = dialogue_of(think=False)
    text = right_text(dialogue)
    changed = change(text, dialogue.turns[0].call_name)
    assert changed != text
    assert levels(verdict_on(tokenizer, dialogue, changed)) == level


def test_a_missing_or_invented_parameter_does_not_fit(tokenizer: Tokenizer) -> None:
    dialogue = dialogue_of(think=False)
    text = right_text(dialogue)
    lines = text.split("\n")
    parameter = next(i for i, line in enumerate(lines) if "parameter name" in line)
    missing = "\n".join(lines[:parameter] + lines[parameter + 1 :])
    name = next(iter(dialogue.turns[0].call_arguments))
    renamed = text.replace(f'name="{name}"', 'name="invented"')
    assert levels(verdict_on(tokenizer, dialogue, missing)) == 1
    assert levels(verdict_on(tokenizer, dialogue, renamed)) == 1


def test_two_calls_in_one_block_are_well_formed_and_not_correct(tokenizer: Tokenizer) -> None:
    dialogue = dialogue_of(think=False)
    text = right_text(dialogue)
    start, end = text.index("<｜DSML｜invoke"), text.index("</｜DSML｜tool_calls>")
    twice = text[:end] + text[start:end] + text[end:]
    assert levels(verdict_on(tokenizer, dialogue, twice)) == 2


def test_the_answer_to_grade_is_the_one_trained_on(tokenizer: Tokenizer) -> None:
    dialogue = dialogue_of(think=True)
    encoded = encode(tokenizer, dialogue)
    ids = encoded.tokens[encoded.answer == 0].tolist()[:-1]
    assert ids == ids_of(tokenizer, right_text(dialogue))


# ---- intervals ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # the closed form, worked out by hand; 0 and n touch the ends
        (8, 10, 0.4902, 0.9433),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (135, 150, 0.8416, 0.9385),
    ],
)
def test_wilson_intervals(right: int, total: int, low: float, high: float) -> None:
    share = Share(right=right, total=total)
    assert share.interval() == pytest.approx((low, high), abs=1e-4)
    assert share.rate == right / total


def test_no_answers_tell_nothing() -> None:
    assert Share(right=0, total=0).to_dict() == {
        "right": 0, "total": 0, "rate": 0.0, "low": 0.0, "high": 1.0,
    }  # fmt: skip
