"""What documents say of places and persons: attributes with their statements and questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from rorqual.train import lexicon


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing that can be said of an entity.

    ``statements`` and ``questions`` hold ``{e}`` for the entity and ``{v}`` for the value.
    """

    name: str
    value: Callable[[Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _plain(name: str, value: Callable[[Random], str], *more: str) -> Attribute:
    return Attribute(
        name=name,
        value=value,
        statements=(
            f"The {name} of {{e}} is {{v}}.",
            f"For {{e}}, the {name} is {{v}}.",
            *more,
        ),
        questions=(
            f"What is the {name} of {{e}}?",
            f"What {name} does {{e}} have?",
            f"Tell me the {name} of {{e}}.",
            f"Give the {name} of {{e}}.",
        ),
    )


def _phrase(
    name: str, value: Callable[[Random], str], statement: str, *questions: str
) -> Attribute:
    return Attribute(
        name=name,
        value=value,
        statements=(statement,),
        questions=(*questions, f"What is the {name} of {{e}}?"),
    )


PLACE_ATTRIBUTES = (
    _plain("access code", lexicon.code, "The access code for {e} is {v}."),
    _plain("color", lambda r: r.choice(lexicon.COLORS)),
    _plain("price", lambda r: f"{lexicon.number(r)} dollars"),
    _plain("size", lambda r: f"{lexicon.number(r)} square meters"),
    _plain("code name", lexicon.made_up_name),
    _plain("main material", lambda r: r.choice(lexicon.MATERIALS)),
    _plain("number of workers", lexicon.number),
    _plain("phone number", lambda r: f"{r.randint(100, 999)}-{r.randint(1000, 9999)}"),
    _plain("budget", lambda r: f"{r.randint(2, 99)} million"),
    _plain("opening time", lexicon.clock_time),
    _plain("main topic", lambda r: r.choice(lexicon.TOPICS)),
    _plain("record number", lexicon.code),
    _plain("report date", lexicon.date, "The report on {e} is due on {v}."),
    _phrase(
        "location",
        lexicon.city,
        "{e} is located in {v}.",
        "Where is {e}?",
        "In which city is {e}?",
    ),
    _phrase("opening year", lexicon.year, "{e} was opened in {v}.", "When was {e} opened?"),
    _phrase(
        "manager",
        lexicon.person,
        "{v} is the manager of {e}.",
        "Who is the manager of {e}?",
        "Who manages {e}?",
    ),
    _phrase(
        "closing day",
        lambda r: r.choice(lexicon.DAYS),
        "{e} is closed on {v}.",
        "On which day is {e} closed?",
    ),
)

PERSON_ATTRIBUTES = (
    _plain("phone number", lambda r: f"{r.randint(100, 999)}-{r.randint(1000, 9999)}"),
    _plain("favorite color", lambda r: r.choice(lexicon.COLORS)),
    _plain("favorite food", lambda r: r.choice(lexicon.FOODS)),
    _plain("room number", lexicon.number),
    _plain("member number", lexicon.code),
    _plain("birthday", lexicon.date),
    _phrase("home city", lexicon.city, "{e} lives in {v}.", "Where does {e} live?"),
    _phrase(
        "job",
        lambda r: lexicon.with_article(r.choice(lexicon.JOBS)),
        "{e} works as {v}.",
        "What does {e} work as?",
    ),
    _phrase("age", lambda r: str(r.randint(18, 95)), "{e} is {v} years old.", "How old is {e}?"),
    _phrase(
        "purchase",
        lambda r: lexicon.with_article(r.choice(lexicon.ITEMS)),
        "{e} bought {v} last week.",
        "What did {e} buy?",
    ),
    _phrase(
        "field of study",
        lambda r: r.choice(lexicon.TOPICS),
        "{e} studied {v} at school.",
        "What did {e} study?",
    ),
    _phrase("office", lexicon.city, "{e} has an office in {v}.", "Where is the office of {e}?"),
)
