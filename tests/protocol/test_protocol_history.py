"""Turns come back as they were generated, however the client sends them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from protocol_samples import HI, OFF, TOKENIZER, renderer_with

from rorqual.errors import RequestError
from rorqual.protocol.dialects import Protocol
from rorqual.protocol.history import Turn, turn_keys
from rorqual.protocol.parse import Answer
from rorqual.protocol.render import Renderer

PARAMETERS = {"type": "object", "properties": {"a": {}, "b": {"type": "string"}}}
TOOLS: dict[Protocol, Any] = {
    "chat": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}],
    "messages": [{"name": "f", "input_schema": PARAMETERS}],
    "responses": [{"type": "function", "name": "f", "parameters": PARAMETERS, "strict": False}],
}
# Not as the template would write it: spaces in the JSON, a missing line break, no canonical tokens.
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">{"x":  [1,2]}</｜DSML｜parameter>'
    '<｜DSML｜parameter name="b" string="true">é "quoted"\n</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TEXT = f"Let me\n\nthink. </think>I call.{CALL}"


class Notes:
    """A memory that forgets nothing."""

    def __init__(self) -> None:
        self.turns: dict[str, Turn] = {}

    def find(self, keys: Sequence[str]) -> Turn | None:
        return next((self.turns[key] for key in keys if key in self.turns), None)


def generated(text: str) -> list[int]:
    """Ids of ``text`` in the smallest tokens, which no encoder would choose."""
    ids: list[int] = []
    while text:
        special = next((t for t in ("</think>", "｜DSML｜") if text.startswith(t)), None)
        piece = special or text[0]
        ids += [TOKENIZER.special_id(piece)] if special else TOKENIZER.encode_plain(piece)
        text = text[len(piece) :]
    return ids


def body(protocol: Protocol, conversation: list[Any], **fields: Any) -> dict[str, Any]:
    name = "input" if protocol == "responses" else "messages"
    thinking: Any = {"reasoning": {"effort": "low"}}
    if protocol != "responses":
        thinking = {"thinking": {"type": "enabled"}}
    return {"model": "m", "tools": TOOLS[protocol], name: conversation, **thinking, **fields}


def answered(renderer: Renderer, sent: Any, protocol: Protocol, notes: Notes, text: str) -> Any:
    """The whole answer ``text`` to the body ``sent``, remembered."""
    request = renderer.render(sent, protocol, notes)
    answer = Answer(request, TOKENIZER, "id", streamed=False)
    answer.start()
    answer.push(generated(text))
    answer.finish("stop")
    turn = answer.turn(created=1)
    for key in turn_keys(request.history_digest, turn.content, turn.calls):
        notes.turns[key] = turn
    return json.loads(answer.whole(created=1))


def sent_back(protocol: Protocol, answer: Any, *, with_reasoning: bool) -> list[Any]:
    """The turn and a tool result as a client that re-serialises everything sends them."""
    if protocol == "chat":
        message = answer["choices"][0]["message"]
        if not with_reasoning:
            del message["reasoning_content"]
        for call in message["tool_calls"]:
            function = call["function"]
            function["arguments"] = json.dumps(json.loads(function["arguments"]), indent=1)
        (call,) = message["tool_calls"]
        return [message, {"role": "tool", "tool_call_id": call["id"], "content": "42"}]
    if protocol == "messages":
        blocks = [b for b in answer["content"] if with_reasoning or b["type"] != "thinking"]
        result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": "42"}
        return [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    items = [item for item in answer["output"] if with_reasoning or item["type"] != "reasoning"]
    output = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "42"}
    return [*items, output]


@pytest.mark.parametrize("with_reasoning", [True, False])
@pytest.mark.parametrize("protocol", list(TOOLS))
def test_next_prompt_continues_exactly_what_the_model_read_and_wrote(
    protocol: Protocol, with_reasoning: bool
) -> None:
    renderer, notes = renderer_with(), Notes()
    first = body(protocol, HI)
    answer = answered(renderer, first, protocol, notes, TEXT)
    again = sent_back(protocol, answer, with_reasoning=with_reasoning)
    second = renderer.render(body(protocol, [*HI, *again]), protocol, notes)
    before = [*renderer.render(first, protocol).prompt_ids, *generated(TEXT), TOKENIZER.eos_id]
    assert list(second.prompt_ids[: len(before)]) == before
    assert TOKENIZER.decode(second.prompt_ids) == second.prompt
    special = [TOKENIZER.decode([t]) for t in second.prompt_ids if t in TOKENIZER.special_ids]
    assert [second.prompt[start:end] for start, end in second.special_ranges] == special
    forgotten = renderer.render(body(protocol, [*HI, *again]), protocol)
    assert forgotten.prompt_ids != second.prompt_ids
    assert ("<think></think>" in forgotten.prompt) == (not with_reasoning)


def test_a_turn_of_text_is_known_by_all_that_was_said_before() -> None:
    renderer, notes = renderer_with(), Notes()
    answer = answered(renderer, body("chat", HI), "chat", notes, "Hm.</think>Hello.")
    said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    more = {"role": "user", "content": "And?"}
    known = renderer.render(body("chat", [*HI, said, more]), "chat", notes)
    assert "<think>Hm.</think>Hello." in known.prompt
    other = {"role": "user", "content": "Ho"}
    unknown = renderer.render(body("chat", [other, said, more]), "chat", notes)
    assert "<think></think>Hello." in unknown.prompt
    # A system message may change between requests; what was said stays what was said.
    system = {"role": "system", "content": "Be brief."}
    assert "Hm." in renderer.render(body("chat", [system, *HI, said, more]), "chat", notes).prompt


def test_reasoning_is_dropped_and_kept_by_the_official_rule() -> None:
    renderer, notes = renderer_with(), Notes()
    untold = body("chat", HI)
    del untold["tools"]
    answered(renderer, untold, "chat", notes, "Hm.</think>Hello.")
    said = {"role": "assistant", "content": "Hello."}
    talk = [*HI, said, {"role": "user", "content": "And?"}]
    without_tools = {"model": "m", "messages": talk}
    assert "</think>Hello." in renderer.render(without_tools, "chat", notes).prompt
    assert "Hm." not in renderer.render(without_tools, "chat", notes).prompt
    assert "Hm." in renderer.render(body("chat", talk), "chat", notes).prompt
    plain = renderer.render({**body("chat", talk), **OFF}, "chat", notes)
    assert "Hm." not in plain.prompt
    letters = tuple(generated("Hello."))
    assert letters != tuple(TOKENIZER.encode_plain("Hello."))
    ids = plain.prompt_ids
    assert letters in [ids[at : at + len(letters)] for at in range(len(ids))]


def test_an_edited_turn_is_the_clients() -> None:
    renderer, notes = renderer_with(), Notes()
    answer = answered(renderer, body("chat", HI), "chat", notes, TEXT)
    message, result = sent_back("chat", answer, with_reasoning=False)
    message["tool_calls"][0]["function"]["arguments"] = '{"a": 3}'
    request = renderer.render(body("chat", [*HI, message, result]), "chat", notes)
    assert "Let me" not in request.prompt
    assert 'name="a" string="false">3<' in request.prompt


def test_a_cut_turn_gives_back_its_reasoning_but_not_its_tokens() -> None:
    renderer, notes = renderer_with(), Notes()
    request = renderer.render({**body("chat", HI), "stop": "END"}, "chat", notes)
    answer = Answer(request, TOKENIZER, "id", streamed=False)
    answer.start()
    answer.push(generated("Hm.</think>Hello. END more"))
    turn = answer.turn(created=1)
    assert (turn.reasoning, turn.content, turn.ids) == ("Hm.", "Hello. ", ())
    notes.turns.update(
        dict.fromkeys(turn_keys(request.history_digest, turn.content, turn.calls), turn)
    )
    talk = [*HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}]
    prompt = renderer.render(body("chat", talk), "chat", notes).prompt
    assert "<think>Hm.</think>Hello.<｜end" in prompt


def test_strict_rendering_refuses_calls_without_their_reasoning() -> None:
    renderer = renderer_with()
    strict = Renderer(renderer.card, TOKENIZER, is_strict=True)
    answer = answered(renderer, body("messages", HI), "messages", Notes(), TEXT)
    talk = [*HI, *sent_back("messages", answer, with_reasoning=False)]
    with pytest.raises(RequestError, match="must be passed back") as caught:
        strict.render(body("messages", talk), "messages")
    assert caught.value.param == "messages"
    assert renderer.render(body("messages", talk), "messages").prompt
