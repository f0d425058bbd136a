"""What guessing ahead gains where answers quote: a trained model asked about a document."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rorqual.bench.behaviour import BehaviourRow
from rorqual.bench.setup import Setup
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer

_ADJECTIVES = ("bright", "royal", "silent", "northern", "old", "green", "upper", "little")
_PLACES = ("lab", "museum", "bridge", "library", "station", "garden")
_QUESTIONS = 8
_MAX_TOKENS = 128


def document(num_places: int) -> tuple[str, list[str]]:
    """Key facts of several places, and a question about each."""
    names = [f"{adjective} {place}" for place in _PLACES for adjective in _ADJECTIVES]
    facts, questions = [], []
    for index, name in enumerate(names[:num_places]):
        facts.append(f"The {name} was opened in {1950 + 7 * index % 70}.")
        facts.append(f"The number of workers of the {name} is {40 + 13 * index}.")
        facts.append(f"For the {name}, the price is {90 + 11 * index} dollars.")
        questions.append(f"What is the number of workers of the {name}?")
    return "Document:\n" + "\n".join(facts), questions


def speculation_rows(model: Path, num_places: int = 24) -> list[BehaviourRow]:
    """Answers with guesses ahead over answers without, which have the same tokens."""
    prompts = _prompts(model, num_places)
    setup = Setup(model=model, weights="as stored")
    with setup.open() as engine:
        plain_rate, plain = _answers(engine, prompts, setup.config.eos_token_id)
    with replace(setup, speculate=True).open() as engine:
        rate, told = _answers(engine, prompts, setup.config.eos_token_id)
        stats = engine.stats()
    same = sum(a == b for a, b in zip(plain, told, strict=True))
    detail = (
        f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right; "
        f"{plain_rate:.0f} -> {rate:.0f} tokens/cpu-s; same answers: {same}/{len(told)}"
    )
    return [BehaviourRow(name="guessing ahead", value=rate / plain_rate, unit="x", detail=detail)]


def _prompts(model: Path, num_places: int) -> list[tuple[int, ...]]:
    card, tokenizer = ModelCard.from_dir(model), Tokenizer.from_dir(model)
    renderer = Renderer(card, tokenizer)
    text, questions = document(num_places)
    contents = [f"{text}\n\nQuestion: {question}" for question in questions[:_QUESTIONS]]
    return [
        renderer.render(
            {"model": card.name, "messages": [{"role": "user", "content": content}]}
        ).prompt_ids
        for content in contents
    ]


def _answers(
    engine: Engine, prompts: list[tuple[int, ...]], stop: int
) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens per CPU-second after the first of each answer, and the answers."""
    sampling = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, stop_token_ids=(stop,))
    seconds, answers = 0.0, []
    for prompt in prompts:
        stamps: list[float] = []
        tokens: list[int] = []
        request = Request(prompt_ids=prompt, sampling=sampling, request_id="document")
        for output in engine.submit(request):
            stamps.append(time.process_time())
            tokens += output.token_ids
        seconds += stamps[-1] - stamps[0]
        answers.append(tuple(tokens))
    return sum(len(answer) - 1 for answer in answers) / seconds, answers
