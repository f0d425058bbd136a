"""What is trained on is what will be served, and the loss falls on what must be generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from rorqual.protocol.modes import ModelCard, request_fields
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import ASSISTANT, EOS, THINK_END, Tokenizer
from rorqual.train import copying, data, documents, small_talk, tool_use
from rorqual.train.conversation import Dialogue, Turn, encode, prompt_ids

from .conftest import EASY, NANO


def evidence(rng: Random) -> Dialogue:
    return documents.make_dialogue(rng, document_tokens=200, num_questions=4, split="train")


def evidence_with_tools(rng: Random) -> Dialogue:
    tools = tool_use.make_tools(rng, 2)
    return documents.make_dialogue(
        rng, document_tokens=200, num_questions=3, split="train", tools=tools
    )


def tool(rng: Random) -> Dialogue:
    return tool_use.make_dialogue(rng, num_requests=3, split="train")


def copied(rng: Random) -> Dialogue:
    return copying.make_dialogue(rng, num_tokens=100)


MAKERS = (evidence, evidence_with_tools, tool, copied, small_talk.make_dialogue)
Make = Callable[[Random], Dialogue]


def generated_text(dialogue: Dialogue, number: int) -> str:
    """What the model must write in turn ``number``, spelled out by hand."""
    turn = dialogue.turns[number]
    text = turn.content
    if turn.call_name:
        lines = ["\n\n<｜DSML｜tool_calls>", f'<｜DSML｜invoke name="{turn.call_name}">']
        for name, value in turn.call_arguments.items():
            is_text = isinstance(value, str)
            spelled = value if is_text else json.dumps(value)
            lines.append(
                f'<｜DSML｜parameter name="{name}" string="{str(is_text).lower()}">'
                f"{spelled}</｜DSML｜parameter>"
            )
        text += "\n".join([*lines, "</｜DSML｜invoke>", "</｜DSML｜tool_calls>"])
    # Without tools V4's template drops the reasoning of all turns but the last.
    last = number == len(dialogue.turns) - 1
    if dialogue.think and (dialogue.tools or last):
        text = turn.reasoning + THINK_END + text
    return text + EOS


@pytest.mark.parametrize("make", MAKERS)
def test_loss_falls_on_every_generated_token_and_no_other(make: Make, tokenizer: Tokenizer) -> None:
    modes = set()
    for seed in range(12):
        dialogue = make(Random(seed))
        modes.add(dialogue.think)
        encoded = encode(tokenizer, dialogue)
        assert encoded.kinds == tuple(turn.kind for turn in dialogue.turns)
        rest = encoded.tokens.copy()
        for number in range(len(dialogue.turns)):
            places = np.flatnonzero(encoded.answer == number)
            assert places[-1] - places[0] + 1 == len(places)  # one stretch
            assert tokenizer.decode(encoded.tokens[places].tolist()) == generated_text(
                dialogue, number
            )
            assert encoded.tokens[places[0] - 2] == tokenizer.assistant_id
            assert encoded.tokens[places[0] - 1] in (
                tokenizer.think_start_id,
                tokenizer.think_end_id,
            )
            rest[places] = -1
        assert (rest[encoded.answer >= 0] == -1).all()
        given = tokenizer.decode(rest[rest >= 0].tolist())
        assert EOS not in given
        assert given.count(ASSISTANT) == len(dialogue.turns)
    assert modes == ({False} if make is copied else {False, True})


@pytest.mark.parametrize("make", MAKERS)
def test_a_training_sample_begins_with_the_prompt_of_each_turn(
    make: Make, tokenizer: Tokenizer
) -> None:
    for seed in range(12):
        dialogue = make(Random(seed))
        encoded = encode(tokenizer, dialogue)
        for number in range(len(dialogue.turns)):
            last = number == len(dialogue.turns) - 1
            if dialogue.think and not dialogue.tools and not last:
                continue  # its reasoning is gone from the history
            start = int(np.flatnonzero(encoded.answer == number)[0])
            assert encoded.tokens[:start].tolist() == prompt_ids(tokenizer, dialogue, number)


@pytest.mark.parametrize("make", MAKERS)
def test_prompts_are_those_a_server_renders(make: Make, tokenizer: Tokenizer) -> None:
    render = renderer(tokenizer)
    for seed in range(12):
        dialogue = make(Random(seed))
        for number in range(len(dialogue.turns)):
            served = render(request_body(dialogue, number))
            assert list(served.prompt_ids) == prompt_ids(tokenizer, dialogue, number)


def renderer(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], RenderedRequest]:
    return Renderer(ModelCard.from_dir(NANO), tokenizer).render


def request_body(dialogue: Dialogue, number: int) -> dict[str, Any]:
    """The Chat Completions request a client sends to get turn ``number``."""
    messages: list[dict[str, Any]] = []
    if dialogue.system:
        messages.append({"role": "system", "content": dialogue.system})
    for index, turn in enumerate(dialogue.turns[: number + 1]):
        if turn.kind == "result":
            call_id = f"id{index - 1}"
            messages.append({"role": "tool", "tool_call_id": call_id, "content": turn.user})
        else:
            messages.append({"role": "user", "content": turn.user})
        if index < number:
            messages.append(assistant_message(turn, index, think=dialogue.think))
    body = {
        "model": "nano-flash",
        "messages": messages,
        **request_fields("think" if dialogue.think else "non-think"),
    }
    if dialogue.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in dialogue.tools]
    return body


def assistant_message(turn: Turn, index: int, *, think: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if think:
        message["reasoning_content"] = turn.reasoning
    if turn.call_name:
        function = {"name": turn.call_name, "arguments": json.dumps(turn.call_arguments)}
        message["tool_calls"] = [{"id": f"id{index}", "type": "function", "function": function}]
    return message


def test_a_sample_is_cut_after_a_whole_turn(tokenizer: Tokenizer) -> None:
    dialogue = tool_use.make_dialogue(Random(5), num_requests=5, split="train")
    encoded = encode(tokenizer, dialogue)
    ends = data.turn_ends(encoded)
    assert len(ends) == len(dialogue.turns)
    assert (encoded.tokens[ends - 1] == tokenizer.eos_id).all()
    for limit in (int(ends[1]), int(ends[2]) + 3, len(encoded)):
        cut = data.fit(encoded, limit)
        assert cut is not None
        assert len(cut) <= limit
        assert len(cut) in ends
        assert cut.kinds == encoded.kinds[: len(cut.kinds)]
        assert int(cut.answer.max()) == len(cut.kinds) - 1
        assert (cut.tokens == encoded.tokens[: len(cut)]).all()
    assert data.fit(encoded, int(ends[0]) - 1) is None


def test_samples_of_every_task_carry_a_loss(tokenizer: Tokenizer) -> None:
    for task in ("evidence", "tool", "chat"):
        for seed in range(10):
            sample = data.make_sample(tokenizer, Random(seed), task, EASY, "train")
            assert sample is None or (sample.answer >= 0).sum() >= 3
