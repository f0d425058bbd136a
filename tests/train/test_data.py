"""Training data: a function of the seed, and never what evaluation asks."""

from __future__ import annotations

import dataclasses
import json
import re
from random import Random

import numpy as np
import pytest

from rorqual.errors import ConfigError, TrainingError
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train import data, documents, tool_use
from rorqual.train.attributes import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES
from rorqual.train.conversation import Dialogue, Encoded
from rorqual.train.data import Difficulty, SampleStream
from rorqual.train.exam import LENGTH_BUCKETS, draw_documents, draw_tool_dialogues
from rorqual.train.tool_families import FAMILIES

from .conftest import EASY, HARD

_ASKED = re.compile(r"The question asks for the (?P<attribute>.+?) of (?P<entity>.+)\.")


def draw(stream: SampleStream, count: int, difficulty: Difficulty = EASY) -> list[Encoded]:
    return [stream.draw(difficulty) for _ in range(count)]


def same(a: Encoded, b: Encoded) -> bool:
    return (
        a.task == b.task
        and a.kinds == b.kinds
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.answer, b.answer)
    )


def asked_in(dialogue: Dialogue) -> set[tuple[str, str]]:
    """(entity, attribute) of every question, stated or not."""
    found = {
        _ASKED.fullmatch(turn.reasoning)
        for turn in dialogue.turns
        if turn.kind in ("evidence", "absent")
    }
    assert None not in found
    return {(match["entity"], match["attribute"]) for match in found if match}


# ---- determinism -------------------------------------------------------------------------------
def test_samples_depend_on_the_seed_and_nothing_else(tokenizer: Tokenizer) -> None:
    first, again, other = (
        draw(SampleStream(tokenizer, seed=seed, split="train"), 12) for seed in (3, 3, 4)
    )
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_a_stream_continues_from_its_state(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, seed=3, split="train")
    draw(stream, 5)
    resumed = SampleStream(tokenizer, seed=3, split="train", state=stream.state)
    assert all(map(same, draw(stream, 6, HARD), draw(resumed, 6, HARD)))
    assert stream.state == resumed.state


def share_of_tools(samples: list[Encoded]) -> float:
    return sum(len(s) for s in samples if s.task == "tool") / sum(map(len, samples))


def test_tasks_get_their_shares_of_tokens(tokenizer: Tokenizer) -> None:
    samples = draw(SampleStream(tokenizer, seed=1, split="train"), 150)
    assert share_of_tools(samples) == pytest.approx(EASY.tool_share, abs=0.04)
    chat = sum(len(s) for s in samples if s.task == "chat") / sum(map(len, samples))
    assert chat == pytest.approx(EASY.chat_share, abs=0.02)


def test_a_task_that_comes_late_does_not_crowd_out_the_others(tokenizer: Tokenizer) -> None:
    stream = SampleStream(tokenizer, seed=1, split="train")
    draw(stream, 150, dataclasses.replace(EASY, tool_share=0.0))
    first = draw(stream, 60)
    assert EASY.tool_share < share_of_tools(first) < 2 * EASY.tool_share
    assert share_of_tools(draw(stream, 150)) == pytest.approx(EASY.tool_share, abs=0.05)


def test_no_sample_is_longer_than_allowed(tokenizer: Tokenizer) -> None:
    samples = draw(SampleStream(tokenizer, seed=1, split="train"), 40, HARD)
    assert max(map(len, samples)) <= HARD.max_sample_tokens
    assert max(map(len, samples)) > 0.7 * HARD.max_sample_tokens


def test_a_difficulty_no_sample_fits_is_refused(tokenizer: Tokenizer) -> None:
    impossible = Difficulty(
        min_document_tokens=60, max_document_tokens=60, max_sample_tokens=64, tool_share=1.0
    )
    stream = SampleStream(tokenizer, seed=1, split="train")
    with pytest.raises(ConfigError, match="no tool sample fits max_sample_tokens = 64"):
        stream.draw(impossible)


# ---- the held-out split ------------------------------------------------------------------------
def test_training_neither_states_nor_asks_what_evaluation_asks(tokenizer: Tokenizer) -> None:
    trained: set[tuple[str, str]] = set()
    for seed in range(250):
        document = documents.make_document(Random(seed), 600, "train")
        trained |= {(fact.entity, fact.attribute.name) for fact in document.facts}
        dialogue = documents.make_dialogue(
            Random(seed), document_tokens=600, num_questions=30, split="train"
        )
        assert document.text in dialogue.turns[0].user  # the facts above are the ones it states
        trained |= asked_in(dialogue)
    evaluated: set[tuple[str, str]] = set()
    for seed in range(1000, 1100):
        evaluated |= asked_in(
            documents.make_dialogue(
                Random(seed), document_tokens=600, num_questions=30, split="held-out"
            )
        )
    for bucket in LENGTH_BUCKETS[:2]:
        for exam in draw_documents(tokenizer, seed=0, bucket=bucket, num_questions=60):
            asked = (*exam.questions, *exam.follow_ups)
            evaluated |= {(question.entity, question.attribute) for question in asked}
    assert len(evaluated) > 900
    assert len(trained) > 4000
    assert not trained & evaluated


def test_training_documents_repeat_combinations_across_seeds() -> None:
    """So that the disjointness above is a property of the split and not of chance."""
    halves: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())
    for seed in range(120):
        for fact in documents.make_document(Random(seed), 600, "train").facts:
            halves[seed % 2].add((fact.entity, fact.attribute.name))
    assert len(halves[0] & halves[1]) > 50


def test_absent_questions_of_the_exam_are_not_stated(tokenizer: Tokenizer) -> None:
    num_absent = 0
    for exam in draw_documents(tokenizer, seed=1, bucket=(513, 1024), num_questions=40):
        for question in exam.questions:
            if question.fact is None:
                num_absent += 1
                assert (
                    question.entity in exam.text
                    or documents.capitalized(question.entity) in exam.text
                )
                attribute = next(
                    a
                    for a in (*PLACE_ATTRIBUTES, *PERSON_ATTRIBUTES)
                    if a.name == question.attribute
                    and question.text in [q.format(e=question.entity) for q in a.questions]
                )
                for statement in attribute.statements:
                    start = statement.partition("{v}")[0].format(e=question.entity)
                    assert not start or documents.capitalized(start) not in exam.text
    assert num_absent >= 10


def test_tool_arguments_of_evaluation_are_never_trained_on() -> None:
    def calls(dialogue: Dialogue) -> set[tuple[int, str]]:
        by_name = {name: i for i, f in enumerate(FAMILIES) for name in f.names}
        return {
            (by_name[t.call_name], json.dumps(list(t.call_arguments.values())))
            for t in dialogue.turns
            if t.kind == "call"
        }

    trained: set[tuple[int, str]] = set()
    for seed in range(1500):
        trained |= calls(tool_use.make_dialogue(Random(seed), num_requests=4, split="train"))
    evaluated: set[tuple[int, str]] = set()
    for dialogue in draw_tool_dialogues(seed=0, first=0, count=300, num_requests=2):
        evaluated |= calls(dialogue)
    assert len(evaluated) > 300
    assert not trained & evaluated


def test_every_tool_family_has_arguments_in_both_splits() -> None:
    for family in FAMILIES:
        for split in ("train", "held-out"):
            values = tool_use.draw_arguments(Random(0), family, split)
            assert tool_use.is_held_out(family, values) == (split == "held-out")


def test_a_family_without_held_out_arguments_is_an_error_and_not_a_hang() -> None:
    timer = next(f for f in FAMILIES if f.names[0] == "set_timer")
    trained = next(n for n in range(1, 120) if not tool_use.is_held_out(timer, {"minutes": n}))
    fixed = tool_use.Family(
        names=timer.names,
        description="",
        parameters=(
            type(timer.parameters[0])(
                key="minutes", names=("minutes",), kind="integer", value=lambda _: trained
            ),
        ),
        requests=(),
        result=lambda _: {},
        answers=(),
    )
    with pytest.raises(TrainingError, match="'set_timer' has no held-out arguments"):
        tool_use.draw_arguments(Random(0), fixed, "held-out")


def test_copying_exercises_stay_out_of_the_held_out_split() -> None:
    always = Difficulty(
        min_document_tokens=60,
        max_document_tokens=90,
        max_sample_tokens=1280,
        tool_share=0.0,
        copy_share=1.0,
    )
    kinds = {
        split: {
            turn.kind
            for seed in range(20)
            for turn in data.make_dialogue(Random(seed), "evidence", always, split).turns
        }
        for split in ("train", "held-out")
    }
    assert kinds["train"] == {"copy"}
    assert "copy" not in kinds["held-out"]


# ---- documents ---------------------------------------------------------------------------------
def test_answers_quote_their_document_and_absent_facts_are_absent() -> None:
    for seed in range(60):
        rng = Random(seed)
        document = documents.make_document(rng, 500, "held-out")
        assert len({(f.entity, f.attribute.name) for f in document.facts}) == len(document.facts)
        for fact in document.facts:
            assert fact.sentence in document.text
            assert fact.value.lower() in fact.sentence.lower()
        absent = documents.draw_absent(rng, document, "held-out", attempts=50)
        if absent is not None:
            stated = {(f.entity, f.attribute.name) for f in document.facts}
            assert (absent[0], absent[1].name) not in stated


def test_exam_documents_have_the_length_they_are_filed_under(tokenizer: Tokenizer) -> None:
    for low, high in LENGTH_BUCKETS:
        exams = draw_documents(tokenizer, seed=5, bucket=(low, high), num_questions=90)
        assert sum(q.fact is not None for e in exams for q in e.questions) == 90
        for exam in exams:
            assert low <= len(tokenizer.encode_plain(exam.text)) <= high
            assert all(q.fact.sentence in exam.text for q in exam.questions if q.fact)
            assert exam.questions[0] not in exam.follow_ups


def test_the_exam_depends_on_its_seed_alone(tokenizer: Tokenizer) -> None:
    first, again, other = (
        draw_documents(tokenizer, seed=seed, bucket=(64, 512), num_questions=12)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
