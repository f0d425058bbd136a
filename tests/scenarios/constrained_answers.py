"""Requests answered by an engine around a babbling model and read by the official stream parser.

The babbler knows no language: it draws any token, with a liking for those that end things, since
an answer of uniform tokens would never come to the end of a string.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.engine.engine import Engine
from rorqual.engine.handle import Handle
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.torch_backend import TorchBackend
from rorqual.model.config import TINY
from rorqual.protocol.constraint import ConstraintSpec, constraint_of
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.parse import Answer
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import DSML, Tokenizer
from rorqual.testing.fake_model import FakeModel, FakeState

NANO = Path(__file__).parents[2] / "models" / "nano-flash"
TOKENIZER = Tokenizer.from_dir(NANO)
CARD = ModelCard.from_dir(NANO)
RENDERER = Renderer(CARD, TOKENIZER, is_constrained=True)
TIMEOUT_S = 120.0
CONFIG = dataclasses.replace(TINY, vocab_size=TOKENIZER.vocab_size)


def token(text: str) -> int:
    """The one token spelled ``text``."""
    [only] = TOKENIZER.encode_plain(text)
    return only


LIKINGS: Mapping[int, float] = {
    TOKENIZER.special_id(DSML): 15.0,
    TOKENIZER.eos_id: 12.0,
    token("</"): 11.0,
    token('"'): 11.0,
    token("}"): 9.0,
    token("]"): 9.0,
    token(","): 6.0,
}
"""Added logits; at temperature 2 a token liked by 11 is 245 times as likely as another."""


class Babbler(FakeModel):
    """All tokens equally likely but for ``likings``."""

    def __init__(self, likings: Mapping[int, float] = LIKINGS) -> None:
        super().__init__(CONFIG)
        self._logits = torch.zeros(CONFIG.vocab_size)
        for liked, by in likings.items():
            self._logits[liked] = by

    def logits_after(self, state: FakeState) -> Tensor:
        return self._logits


class Writer(FakeModel):
    """Wants to write ``text_of`` its sequence's first token, token by token, come what may.

    What it may not write next it skips, except for what the engine draws in its place.
    """

    def __init__(self, scripts: Mapping[int, Sequence[int]]) -> None:
        super().__init__(CONFIG)
        self._scripts = scripts

    def logits_after(self, state: FakeState) -> Tensor:
        script = self._scripts[state.tokens[0]]
        at = len(state.tokens) - 1
        logits = torch.zeros(CONFIG.vocab_size)
        for rank, wanted in enumerate(script[at : at + 30]):
            logits[wanted] = max(float(logits[wanted]), 1000.0 / (rank + 1))
        logits[TOKENIZER.eos_id] += 5.0
        return logits


class Reply(NamedTuple):
    """What a client gets."""

    finish_reason: str
    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    """Function names and arguments' texts."""
    text: str
    """All the model wrote."""


def render(fields: Mapping[str, Any]) -> RenderedRequest:
    """``fields`` beside a model and a message."""
    message = {"role": "user", "content": "Give me json."}
    return RENDERER.render({"model": CARD.name, "messages": [message], **fields})


def read(request: RenderedRequest, tokens: Sequence[int], reason: str) -> Reply:
    """``tokens`` as the answer to ``request``, through the stream parser."""
    answer = Answer(request, TOKENIZER, "id", streamed=False)
    answer.start()
    answer.push(tokens)
    answer.finish("length" if reason == "length" else "stop")
    choice = json.loads(answer.whole(0))["choices"][0]
    message = choice["message"]
    calls = [c["function"] for c in message.get("tool_calls") or ()]
    return Reply(
        finish_reason=choice["finish_reason"],
        reasoning=message.get("reasoning_content") or "",
        content=message.get("content") or "",
        calls=[(call["name"], call["arguments"]) for call in calls],
        text=TOKENIZER.decode(tokens),
    )


Ask = Callable[[Mapping[str, Any]], Callable[[], Reply]]


@contextmanager
def serving(model: FakeModel) -> Iterator[Ask]:
    """An engine to ask; each question returns at once, its result waits for the answer."""
    with Engine(TorchBackend(model)) as engine:

        def ask(fields: Mapping[str, Any]) -> Callable[[], Reply]:
            rest = dict(fields)
            seed, max_tokens = rest.pop("seed", 0), rest.pop("limit", 600)
            request = render(rest)
            constraint = constraint_of(request, TOKENIZER, CARD.generation)
            handle = submit(engine, constraint, seed=seed, max_tokens=max_tokens)

            def result() -> Reply:
                outcome = handle.result(TIMEOUT_S)
                assert outcome.error is None, outcome.error
                return read(request, outcome.token_ids, outcome.finish_reason)

            return result

        yield ask


def submit(
    engine: Engine,
    constraint: ConstraintSpec | None,
    *,
    seed: int,
    max_tokens: int,
    first: int = 0,
    temperature: float = 2.0,
) -> Handle:
    """One request whose whole prompt is the token ``first``."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_token_ids=(TOKENIZER.eos_id,),
    )
    return engine.submit(
        Request(prompt_ids=(first,), sampling=sampling, request_id=f"{seed}", constraint=constraint)
    )
