"""Sessions around a model that recites what a test wants it to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rorqual.cli.session import Session
from rorqual.engine.engine import Engine
from rorqual.model.config import TINY
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.testing.fake_model import ScriptedModel

ScriptedSession = Callable[[Sequence[str]], AbstractContextManager[Session]]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of model output, its template tokens spelled out."""
    ids: list[int] = []
    for part in re.split("(</think>|｜DSML｜)", text):
        special = part in ("</think>", "｜DSML｜")
        ids += [tokenizer.special_id(part)] if special else tokenizer.encode_plain(part)
    return ids


@contextmanager
def scripted_session(
    tokenizer: Tokenizer, card: ModelCard, answers: Sequence[str]
) -> Iterator[Session]:
    """A session whose model gives ``answers``, one per assistant turn.

    An answer that ends with ``…`` never stops: its last token repeats.
    """
    ids = [encode(tokenizer, answer.removesuffix("…")) for answer in answers]
    endless = [answer.endswith("…") for answer in answers]

    def script(tokens: Sequence[int]) -> int:
        headers = [at for at, t in enumerate(tokens) if t == tokenizer.assistant_id]
        turn, written = len(headers) - 1, len(tokens) - headers[-1] - 2
        if written < len(ids[turn]):
            return ids[turn][written]
        return ids[turn][-1] if endless[turn] else tokenizer.eos_id

    config = TINY.replace(vocab_size=tokenizer.vocab_size)
    engine = Engine(ScriptedModel(script, config))
    try:
        yield Session(
            card=card,
            tokenizer=tokenizer,
            renderer=Renderer(card, tokenizer),
            engine=engine,
            context_tokens=card.context_length,
        )
    finally:
        engine.close(drain=False)
