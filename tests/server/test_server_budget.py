"""Reasoning never takes the whole answer, on the real engine with a model that would not stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from asgi_call import BODY, call, post, sse_data

from rorqual.engine.engine import Engine
from rorqual.engine.torch_backend import TorchBackend
from rorqual.model.config import TINY
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import Application, create_app
from rorqual.testing.fake_model import ScriptedModel


@pytest.fixture
def app(tokenizer: Tokenizer, nano_card: ModelCard) -> Iterator[Application]:
    """A model that thinks for ever, but answers once its reasoning is closed."""
    (hm,) = tokenizer.encode_plain(" the")
    answer = [*tokenizer.encode_plain("It is 21."), tokenizer.eos_id]

    def script(tokens: Sequence[int]) -> int:
        last_think = max(i for i, t in enumerate(tokens) if t in think_ids)
        if tokens[last_think] == tokenizer.think_start_id:
            return hm
        return answer[len(tokens) - last_think - 1]

    think_ids = (tokenizer.think_start_id, tokenizer.think_end_id)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    with Engine(TorchBackend(ScriptedModel(script, config))) as engine:
        yield create_app(engine, tokenizer, nano_card)


@pytest.mark.parametrize(
    ("thinking", "num_reasoning"),
    [({}, 40 - 10 - 1), ({"budget_tokens": 7}, 7), ({"budget_tokens": 39}, 29)],
)
def test_the_answer_keeps_its_share(
    app: Application, thinking: dict[str, int], num_reasoning: int
) -> None:
    asked: Any = {"max_tokens": 40, "thinking": {"type": "enabled", **thinking}}
    answer = post(app, **asked).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "It is 21."
    assert message["reasoning_content"].count("the") == num_reasoning
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = sse_data(post(app, **asked, stream=True).text)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is 21."


def test_who_asks_for_reasoning_only_gets_it(app: Application) -> None:
    thinking = {"type": "enabled", "reserve_tokens": 0}
    answer = post(app, max_tokens=40, thinking=thinking).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert not answer["choices"][0]["message"]["content"]


def test_the_same_in_messages_and_responses(app: Application) -> None:
    thinking = {"type": "enabled", "budget_tokens": 5}
    body = {**BODY, "max_tokens": 40, "thinking": thinking}
    blocks = call(app, "POST", "/v1/messages", json=body).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    asked = {"max_output_tokens": 40, "reasoning": {"effort": "low"}}
    response = call(
        app, "POST", "/v1/responses", json={"model": "nano-flash", "input": "Hi", **asked}
    ).json()
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["status"] == "completed"
