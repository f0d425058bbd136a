"""What the final evaluation asks: held-out questions as chat messages, with their right answers.

Drawn from a seed like training data, but from the held-out split only, which training never
states or asks (see ``documents`` and ``tool_use``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from random import Random
from typing import Any

from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train import documents, tool_use
from rorqual.train.attributes import Attribute
from rorqual.train.conversation import Dialogue
from rorqual.train.documents import Fact

LENGTH_BUCKETS = ((64, 512), (513, 1024), (1025, 2048), (2049, 4096))
"""Document lengths in tokens, both ends included."""

QUESTIONS_PER_DOCUMENT = 6
ABSENT_PER_DOCUMENT = 2
FOLLOW_UPS_PER_DOCUMENT = 2

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, for ``attribute`` of ``entity``."""

    text: str
    entity: str
    attribute: str
    fact: Fact | None
    """None where the document does not state it."""


@dataclass(frozen=True, kw_only=True)
class DocumentExam:
    """One document with questions to be asked one by one, and more for a conversation."""

    text: str
    num_tokens: int
    system: str
    frame: str
    """How a question is put together with the document: ``{d}`` and ``{q}``."""
    questions: tuple[Question, ...]
    """Stated facts first, then what the document does not state."""
    follow_ups: tuple[Question, ...]
    """Asked in one conversation after the first of ``questions``; worded as such."""

    def opening(self, question: Question) -> list[Message]:
        """The messages of a conversation that starts with ``question``."""
        user = self.frame.format(d=self.text, q=question.text)
        return [*_system(self.system), {"role": "user", "content": user}]


def draw_documents(
    tokenizer: Tokenizer, *, seed: int, bucket: tuple[int, int], num_questions: int
) -> list[DocumentExam]:
    """Documents of ``bucket``'s length with exactly ``num_questions`` stated questions in all."""
    exams: list[DocumentExam] = []
    number = 0
    while num_questions > 0:
        rng = Random(f"exam/{seed}/{bucket}/{number}")
        number += 1
        exam = _draw_document(tokenizer, rng, bucket, min(QUESTIONS_PER_DOCUMENT, num_questions))
        if exam is not None:
            exams.append(exam)
            num_questions -= sum(q.fact is not None for q in exam.questions)
    return exams


def _draw_document(
    tokenizer: Tokenizer, rng: Random, bucket: tuple[int, int], num_questions: int
) -> DocumentExam | None:
    """None where what was drawn misses the bucket or has too few facts to ask for."""
    low, high = bucket
    document = documents.make_document(rng, int(low * (high / low) ** rng.random()), "held-out")
    num_tokens = len(tokenizer.encode_plain(document.text))
    if not low <= num_tokens <= high or len(document.askable) <= FOLLOW_UPS_PER_DOCUMENT:
        return None
    facts = rng.sample(document.askable, len(document.askable))
    questions = [_about(rng, fact) for fact in facts[:num_questions]]
    for _ in range(ABSENT_PER_DOCUMENT):
        absent = documents.draw_absent(rng, document, "held-out", attempts=100)
        if absent is not None:
            questions.append(_question(rng, *absent, fact=None))
    follow_ups: list[Question] = []
    for fact in facts[-FOLLOW_UPS_PER_DOCUMENT:]:
        question = _about(rng, fact)
        text = rng.choice(documents.FOLLOW_UPS).format(q=question.text)
        follow_ups.append(dataclasses.replace(question, text=text))
    return DocumentExam(
        text=document.text,
        num_tokens=num_tokens,
        system=rng.choice(documents.SYSTEMS) if rng.random() < 0.4 else "",
        frame=rng.choice(documents.FRAMES),
        questions=tuple(questions),
        follow_ups=tuple(follow_ups),
    )


def _about(rng: Random, fact: Fact) -> Question:
    return _question(rng, fact.entity, fact.attribute, fact=fact)


def _question(rng: Random, entity: str, attribute: Attribute, *, fact: Fact | None) -> Question:
    text = documents.ask(rng, entity, attribute)
    return Question(text=text, entity=entity, attribute=attribute.name, fact=fact)


def draw_tool_dialogues(*, seed: int, first: int, count: int, num_requests: int) -> list[Dialogue]:
    """Conversations from number ``first`` on: rounds of request, call, result and answer."""
    return [
        tool_use.make_dialogue(
            Random(f"exam/{seed}/tool/{number}"),
            num_requests=num_requests,
            split="held-out",
            think=False,
        )
        for number in range(first, first + count)
    ]


def tool_opening(dialogue: Dialogue) -> list[Message]:
    """The messages before the first request of ``dialogue``."""
    return _system(dialogue.system)


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []
