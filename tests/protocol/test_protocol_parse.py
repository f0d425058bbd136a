"""Tokens become answers: any grouping, stop strings, probabilities, and what never counts."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_samples import BODY, OFF, TOKENIZER, TOOL, renderer_with

from rorqual.protocol.parse import Answer, Event, Protocol
from rorqual.protocol.render import RenderedRequest

PIECES = st.lists(
    st.sampled_from(
        (
            *("</think>", "｜DSML｜", "<", "</", "tool_calls>", 'invoke name="f">', "\n", "\n\n"),
            *('parameter name="a" string="true">', "x", "END", "EN", "🐋", " ", "{", '"'),
        )
    )
)
BROKEN = st.lists(st.integers(3, 4000), max_size=3)
"""Any ordinary tokens, pieces of characters among them."""


def request_for(**fields: Any) -> RenderedRequest:
    return renderer_with().render({**BODY, **fields})


def ids_of(pieces: list[str]) -> list[int]:
    """Ids as a model writes them: template tokens as tokens."""
    ids: list[int] = []
    for piece in pieces:
        special = piece in ("</think>", "｜DSML｜")
        ids += [TOKENIZER.special_id(piece)] if special else TOKENIZER.encode_plain(piece)
    return ids


def run(request: RenderedRequest, groups: list[list[int]], reason: str = "stop") -> Any:
    """Message, finish reason and usage of the whole answer, checked against the streamed one."""
    whole = Answer(request, TOKENIZER, "id", streamed=False)
    streamed = Answer(request, TOKENIZER, "id")
    events: list[Event] = []
    for answer in (whole, streamed):
        events += answer.start()
        for group in groups:
            events += answer.push(group)
        events += answer.finish(reason)  # type: ignore[arg-type]
        assert answer.is_complete
        assert answer.push([5]) == answer.finish("stop") == []
    choice = json.loads(whole.whole(created=1))
    chunks = [json.loads(event.data)["choices"][0] for event in events]
    assert chunks[0]["delta"]["role"] == "assistant"
    for key in ("content", "reasoning_content"):
        joined = "".join(chunk["delta"].get(key) or "" for chunk in chunks)
        assert joined == (choice["choices"][0]["message"].get(key) or "")
    assert chunks[-1]["finish_reason"] == choice["choices"][0]["finish_reason"]
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return choice["choices"][0] | {"usage": choice["usage"]}


@settings(max_examples=60, deadline=None)
@given(PIECES, BROKEN, st.booleans(), st.booleans(), st.integers(1, 9))
def test_answer_does_not_depend_on_grouping(
    pieces: list[str], broken: list[int], thinks: bool, has_tools: bool, size: int
) -> None:
    fields: dict[str, Any] = {"stop": ["END"], "tools": [TOOL] if has_tools else None}
    request = request_for(**fields, **({} if thinks else OFF))
    ids = ids_of(pieces) + broken
    one_by_one = run(request, [[token] for token in ids])
    grouped = run(request, [ids[at : at + size] for at in range(0, len(ids), size)])
    for answer in (one_by_one, grouped):
        for call in answer["message"].get("tool_calls") or []:
            del call["id"]
    assert one_by_one == grouped


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 4063), max_size=20))
def test_content_is_the_text_of_the_tokens_however_broken(noise: list[int]) -> None:
    ids = [*TOKENIZER.encode_plain("x"), *noise, *TOKENIZER.encode_plain("y")]
    choice = run(request_for(**OFF), [ids])
    assert choice["message"]["content"] == TOKENIZER.decode(ids)
    assert choice["usage"]["completion_tokens"] == len(ids)


def test_stop_string_cuts_answer_text_only_and_across_tokens() -> None:
    request = request_for(stop=["STOP HERE"])
    pieces = ["I will STOP HERE soon", "</think>", "go on ST", "OP", " HE", "RE and more"]
    answer = Answer(request, TOKENIZER, "id", streamed=False)
    answer.start()
    for piece in pieces:
        assert not answer.is_complete
        answer.push(ids_of([piece]))
    assert answer.is_complete
    choice = json.loads(answer.whole(created=1))["choices"][0]
    assert choice["message"]["reasoning_content"] == "I will STOP HERE soon"
    assert choice["message"]["content"] == "go on "
    assert choice["finish_reason"] == "stop"


def test_beginning_of_a_stop_string_is_given_back_when_nothing_follows() -> None:
    choice = run(request_for(stop=["STOP"], **OFF), [ids_of(["do not STO"])], "length")
    assert choice["message"]["content"] == "do not STO"
    assert choice["finish_reason"] == "length"


def test_tags_written_as_ordinary_text_do_not_act() -> None:
    """A model that quotes the document's ``</think>`` or DSML neither ends thinking nor calls."""
    tags = ("<｜DSML｜tool_calls>", '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>")
    quoted = TOKENIZER.encode_plain("\n".join(["</think>\n", *tags, "</｜DSML｜tool_calls>"]))
    choice = run(request_for(tools=[TOOL]), [quoted, [TOKENIZER.think_end_id], quoted])
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["reasoning_content"].count("DSML") == 4
    assert choice["message"]["content"].count("DSML") == 4


def test_unfinished_character_at_the_length_limit_is_dropped_but_counted() -> None:
    ids = TOKENIZER.encode_plain("x🐋")
    choice = run(request_for(**OFF), [ids[:-1]], "length")
    assert choice["message"]["content"] == "x"
    assert choice["usage"]["completion_tokens"] == len(ids) - 1


@settings(max_examples=100, deadline=None)
@given(PIECES, BROKEN, st.sampled_from(["chat", "messages", "responses"]))
def test_every_token_is_counted_wherever_the_answer_ends(
    pieces: list[str], broken: list[int], protocol: Protocol
) -> None:
    ids = ids_of(pieces) + broken
    answer = Answer(request_for(tools=[TOOL]), TOKENIZER, "id", streamed=False, protocol=protocol)
    answer.start()
    answer.push(ids)
    answer.finish("length")
    usage = json.loads(answer.whole(created=1))["usage"]
    assert usage["completion_tokens" if protocol == "chat" else "output_tokens"] == len(ids)


def test_usage_counts_prompt_cache_and_reasoning() -> None:
    request = request_for()
    answer = Answer(request, TOKENIZER, "id")
    events = answer.start(cached_tokens=3)
    thought, text = TOKENIZER.encode_plain("because of this"), TOKENIZER.encode_plain("yes it is")
    events += answer.push([*thought, TOKENIZER.think_end_id, *text]) + answer.finish("stop")
    usage = json.loads(events[-1].data)["usage"]
    prompt = len(request.prompt_ids)
    assert usage["prompt_tokens"] == prompt
    assert usage["prompt_cache_hit_tokens"] == 3
    assert usage["prompt_cache_miss_tokens"] == prompt - 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["completion_tokens"] == len(thought) + 1 + len(text)
    assert usage["completion_tokens_details"]["reasoning_tokens"] in (
        len(thought),
        len(thought) + 1,
    )


def test_logprobs_follow_their_tokens() -> None:
    request = request_for(**OFF, logprobs=True, top_logprobs=2)
    ids = TOKENIZER.encode_plain("ab 🐋")
    answer = Answer(request, TOKENIZER, "id", streamed=False)
    answer.start()
    answer.push(ids, [(-0.5, [(token, -0.5), (5, float("-inf"))]) for token in ids])
    answer.finish("stop")
    content = json.loads(answer.whole(created=1))["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "ab 🐋".encode()
    for entry in content:
        assert entry["logprob"] == -0.5
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -9999.0]


def test_continuation_of_an_answer_keeps_its_leading_newline() -> None:
    begun = {"role": "assistant", "content": "so", "reasoning_content": "r", "prefix": True}
    request = request_for(messages=[*BODY["messages"], begun])
    choice = run(request, [ids_of(["\n far"])])
    assert choice["message"]["content"] == "\n far"
    assert (
        "reasoning_content" not in choice["message"] or not choice["message"]["reasoning_content"]
    )


def test_required_call_starts_inside_the_block_the_prompt_opened() -> None:
    request = request_for(**OFF, tools=[TOOL], tool_choice="required")
    invoke = ["<", "｜DSML｜", 'invoke name="f">\n</', "｜DSML｜", "invoke>\n"]
    choice = run(request, [ids_of([*invoke, "</", "｜DSML｜", "tool_calls>"])])
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls"


def test_json_answers_are_unwrapped_from_their_fence() -> None:
    request = request_for(
        **OFF,
        messages=[{"role": "user", "content": "give json"}],
        response_format={"type": "json_object"},
    )
    choice = run(request, [ids_of(['```json\n{"a": 1}\n```'])])
    assert json.loads(choice["message"]["content"]) == {"a": 1}
    assert "`" not in choice["message"]["content"]
