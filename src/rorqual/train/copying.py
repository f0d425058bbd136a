"""Repeating given text: the densest lesson in looking things up.

Every token of the answer has to be found in the prompt, so a network learns to continue from a
distant match here, long before questions with few informative tokens teach it. There is no
held-out split: the texts are random and none repeats.
"""

from __future__ import annotations

from random import Random

from rorqual.train import lexicon
from rorqual.train.conversation import Dialogue, Turn

_POOL = tuple(
    dict.fromkeys(
        word
        for words in (
            lexicon.ADJECTIVES, lexicon.NOUNS, lexicon.FIRST_NAMES, lexicon.LAST_NAMES,
            lexicon.CITIES, lexicon.COLORS, lexicon.MATERIALS, lexicon.JOBS, lexicon.ITEMS,
            lexicon.FOODS, lexicon.TOPICS, lexicon.MONTHS, lexicon.DAYS,
        )
        for word in words
    )
)  # fmt: skip

_WHOLE = (
    "Repeat this text exactly.\n\n{d}",
    "Copy the following lines.\n\n{d}",
    "{d}\n\nRepeat the text above.",
    "Text:\n{d}\n\nQuestion: What does the text say, word for word?",
)
_LINE = (
    'Which line begins with "{start}"?',
    'Find the line that starts with "{start}".',
    'Quote the line with "{start}".',
)


def make_dialogue(rng: Random, *, num_tokens: int) -> Dialogue:
    """A text of about ``num_tokens`` tokens, repeated whole or line by line in random order."""
    lines: list[str] = []
    room = num_tokens
    while room > 0:
        words = [_word(rng) for _ in range(rng.randint(4, 10))]
        room -= 2 * len(words)
        lines.append(" ".join(words))
    text = "\n".join(lines)
    if rng.random() < 0.5:
        turns = [_turn(rng.choice(_WHOLE).format(d=text), text)]
    else:
        turns = []
        for number, line in enumerate(rng.sample(lines, min(len(lines), 16))):
            start = " ".join(line.split()[: rng.choice((1, 2, 2))])
            question = rng.choice(_LINE).format(start=start)
            turns.append(_turn(question if number else f"{text}\n\n{question}", f'"{line}"'))
    return Dialogue(task="evidence", think=False, turns=tuple(turns))


def _word(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.12:
        return lexicon.number(rng)
    if draw < 0.24:
        return lexicon.code(rng)
    if draw < 0.32:
        return lexicon.made_up_name(rng)
    return rng.choice(_POOL)


def _turn(user: str, content: str) -> Turn:
    return Turn(kind="copy", user=user, content=content, reasoning="")
