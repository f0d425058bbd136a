"""Questions over a document of key facts, answered with the quoted sentence and then the value.

A document is a list of facts (entity, attribute, value) written as sentences, with filler between
them. Entities of one document share words and attributes, so every fact has near neighbours that
differ in one place. Questions follow one another in one conversation.

Held-out split, by construction: ``is_held_out(entity, attribute)`` reserves one combination in
ten for evaluation. Training documents state no such combination and no training question asks
for one; evaluation questions ask for nothing else.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from rorqual.train import lexicon
from rorqual.train.attributes import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, Attribute
from rorqual.train.conversation import Dialogue, Turn

Split = Literal["train", "held-out"]

ABSENT = "Not stated in the document."
TOKENS_PER_FACT = 14
"""Rough tokens of a fact's line in a 4096-entry vocabulary, to aim at a document length."""

_HELD_OUT_ONE_IN = 10
_ABSENT_SHARE = 0.15
"""Questions for something the document does not state. Their answers are short: at 6 % of the
questions they were 2 % of what is learned from, and never learned."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One stated fact; ``sentence`` is its exact wording in the document."""

    entity: str
    attribute: Attribute
    value: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text of facts; ``askable`` are the stated facts of the split it was made for."""

    text: str
    facts: tuple[Fact, ...]
    askable: tuple[Fact, ...]


_FILLERS = (
    "Nothing else was reported this week.",
    "The weather was good for most of the year.",
    "More details will follow in the next report.",
    "The group met again in the early morning.",
    "Many people came to see the new plan.",
    "All of this was written down by hand.",
    "Some of the older records are not complete.",
    "Please keep this information private.",
    "The following facts were checked twice.",
    "There were no other changes at that time.",
    "Most visitors ask about this first.",
    "This part of the list is short.",
    "It took several days to collect the data.",
    "The team will look at the results next month.",
)

SYSTEMS = (
    "You are a careful assistant. Quote the sentence that proves your answer.",
    "Answer from the document only.",
    "You are a helpful assistant.",
    "Use only the given document and quote your evidence.",
    "You are Rorqual, an assistant that answers with evidence.",
)

# How a user gives document {d} and question {q}, and asks on.
FRAMES = (
    "Document:\n{d}\n\nQuestion: {q}",
    "Document:\n{d}\n\nQuestion: {q}",
    "{d}\n\n{q}",
    "{d}\n\nQuestion: {q}",
    "Read this document.\n\n{d}\n\n{q}",
    "Here is a document:\n\n{d}\n\n{q}",
    "<document>\n{d}\n</document>\n\n{q}",
    "Answer from this text:\n\n{d}\n\nQuestion: {q}",
    "Question: {q}\n\nDocument:\n{d}",
    "{q}\n\n{d}",
)
_QUESTION_FIRST = FRAMES[-2:]
_QUESTION_FIRST_SHARE = 0.25
"""Of training documents, on top of their part of ``FRAMES``: the harder order, which only the first
of a document's questions has."""

FOLLOW_UPS = ("{q}", "{q}", "Question: {q}", "And now: {q}")


def is_held_out(entity: str, attribute: str) -> bool:
    """Whether this combination is reserved for evaluation; a fixed hash, independent of seeds."""
    return zlib.crc32(f"{entity}|{attribute}".lower().encode()) % _HELD_OUT_ONE_IN == 0


def _is_in(split: Split, entity: str, attribute: Attribute) -> bool:
    return is_held_out(entity, attribute.name) == (split == "held-out")


def capitalized(text: str) -> str:
    """``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def make_facts(rng: Random, count: int, split: Split) -> list[Fact]:
    """Up to ``count`` facts with distinct (entity, attribute), sharing words with each other.

    In the training split none is held out; in the held-out split about half are.
    """
    entities = _entities(rng, count)
    facts: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    for _ in range(8 * count):
        if len(facts) == count:
            break
        entity, attributes = rng.choice(entities)
        attribute = rng.choice(attributes)
        key = (entity, attribute.name)
        held_out = is_held_out(*key)
        if key in seen or (held_out and split == "train"):
            continue
        if split == "held-out" and not held_out and rng.random() < 0.85:
            continue
        seen.add(key)
        value = attribute.value(rng)
        sentence = rng.choice(attribute.statements).format(e=entity, v=value)
        facts.append(
            Fact(entity=entity, attribute=attribute, value=value, sentence=capitalized(sentence))
        )
    return facts


def _entities(rng: Random, count: int) -> list[tuple[str, tuple[Attribute, ...]]]:
    """A pool of entities with overlapping words, each with the attributes it may have."""
    pool_size = max(3, int(count / rng.uniform(1.5, 5.0)))
    side = max(2, int(pool_size**0.5) + 1)
    adjectives = rng.sample(lexicon.ADJECTIVES, min(side, len(lexicon.ADJECTIVES)))
    nouns = rng.sample(lexicon.NOUNS, min(side, len(lexicon.NOUNS)))
    firsts = rng.sample(lexicon.FIRST_NAMES, min(side, len(lexicon.FIRST_NAMES)))
    lasts = [
        lexicon.made_up_name(rng) if rng.random() < 0.25 else rng.choice(lexicon.LAST_NAMES)
        for _ in range(side)
    ]
    share_of_persons = rng.choice((0.0, 0.3, 0.5, 1.0))
    names: set[str] = set()
    entities: list[tuple[str, tuple[Attribute, ...]]] = []
    places = tuple(rng.sample(PLACE_ATTRIBUTES, rng.randint(5, len(PLACE_ATTRIBUTES))))
    persons = tuple(rng.sample(PERSON_ATTRIBUTES, rng.randint(5, len(PERSON_ATTRIBUTES))))
    for _ in range(pool_size):
        if rng.random() < share_of_persons:
            name, attributes = f"{rng.choice(firsts)} {rng.choice(lasts)}", persons
        else:
            adjective = lexicon.made_up_name(rng) if rng.random() < 0.08 else rng.choice(adjectives)
            name, attributes = f"the {adjective} {rng.choice(nouns)}", places
        if name not in names:
            names.add(name)
            entities.append((name, attributes))
    return entities


def write_document(rng: Random, facts: list[Fact]) -> str:
    """The facts in their order with filler, as lines, a bullet list or paragraphs."""
    share_of_filler = rng.choice((0.0, 0.1, 0.25))
    sentences: list[str] = []
    for fact in facts:
        if rng.random() < share_of_filler:
            sentences.append(rng.choice(_FILLERS))
        sentences.append(fact.sentence)
    style = rng.random()
    if style < 0.5:
        return "\n".join(sentences)
    if style < 0.65:
        return "\n".join(f"- {sentence}" for sentence in sentences)
    paragraphs: list[str] = []
    at = 0
    while at < len(sentences):
        size = rng.randint(2, 6)
        paragraphs.append(" ".join(sentences[at : at + size]))
        at += size
    return rng.choice(("\n", "\n\n")).join(paragraphs)


def answer(fact: Fact) -> str:
    """The evidence answer: the sentence verbatim, then the value."""
    return f'"{fact.sentence}"\n\nAnswer: {fact.value}'


def make_document(rng: Random, document_tokens: int, split: Split) -> Document:
    """A document of about ``document_tokens`` tokens with at least one askable fact."""
    askable: list[Fact] = []
    while not askable:
        facts = make_facts(rng, max(2, document_tokens // TOKENS_PER_FACT), split)
        askable = [f for f in facts if _is_in(split, f.entity, f.attribute)]
    text = write_document(rng, facts)
    return Document(text=text, facts=tuple(facts), askable=tuple(askable))


def ask(rng: Random, entity: str, attribute: Attribute) -> str:
    """A question for this attribute of this entity."""
    return rng.choice(attribute.questions).format(e=entity)


def make_dialogue(
    rng: Random,
    *,
    document_tokens: int,
    num_questions: int,
    split: Split,
    tools: tuple[dict[str, Any], ...] = (),
    think: bool | None = None,
) -> Dialogue:
    """A document of about ``document_tokens`` tokens and questions about it, one per turn.

    ``tools`` are declared but not needed. ``think`` None draws the mode. Fewer questions come out
    where the document holds fewer facts.
    """
    document = make_document(rng, document_tokens, split)
    asked = rng.sample(document.askable, min(num_questions, len(document.askable)))
    if think is None:
        think = rng.random() < 0.3
    turns: list[Turn] = []
    for index, fact in enumerate(asked):
        missing = draw_absent(rng, document, split) if rng.random() < _ABSENT_SHARE else None
        entity, attribute = missing or (fact.entity, fact.attribute)
        question = ask(rng, entity, attribute)
        frames: tuple[str, ...] = FRAMES if index == 0 else FOLLOW_UPS
        if index == 0 and split == "train" and rng.random() < _QUESTION_FIRST_SHARE:
            frames = _QUESTION_FIRST
        frame = rng.choice(frames)
        turns.append(
            Turn(
                kind="absent" if missing else "evidence",
                user=frame.format(d=document.text, q=question),
                content=ABSENT if missing else answer(fact),
                reasoning=f"The question asks for the {attribute.name} of {entity}.",
            )
        )
    return Dialogue(
        task="evidence",
        think=think,
        turns=tuple(turns),
        system=rng.choice(SYSTEMS) if rng.random() < 0.4 else "",
        tools=tools,
    )


def draw_absent(
    rng: Random, document: Document, split: Split, *, attempts: int = 8
) -> tuple[str, Attribute] | None:
    """An (entity, attribute) the document does not state although it mentions the entity.

    None where ``attempts`` draws find none.
    """
    stated = {(fact.entity, fact.attribute.name) for fact in document.facts}
    for _ in range(attempts):
        entity = rng.choice(document.facts).entity
        person = not entity.startswith("the ")
        attribute = rng.choice(PERSON_ATTRIBUTES if person else PLACE_ATTRIBUTES)
        if (entity, attribute.name) not in stated and _is_in(split, entity, attribute):
            return entity, attribute
    return None
