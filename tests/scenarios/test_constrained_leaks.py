"""Whatever a model tries to write of DSML, and however it is cut up, none of it reaches content."""

from __future__ import annotations

import random

import pytest
from constrained_answers import TIMEOUT_S, TOKENIZER, Writer, read, render, submit

from rorqual.engine.engine import Engine
from rorqual.engine.torch_backend import TorchBackend
from rorqual.protocol.constraint import constraint_of
from rorqual.protocol.tokenizer import DSML

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
]
BLOCK = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="a" string="true">x < </y></{DSML}parameter>\n'
    f'<{DSML}parameter name="b" string="false">12</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
TALK = ["Sure. ", "Use `<", "`\n\n", " </", "1 < 2 ", f"the {DSML} mark ", DSML[0], "DSML", ">\n"]


def damaged(rng: random.Random) -> str:
    """A block with pieces lost, doubled, swapped or put in from elsewhere."""
    pieces = BLOCK.replace("<", "\0<").replace(">", ">\0").split("\0")
    for _ in range(rng.randint(0, 5)):
        at = rng.randrange(len(pieces))
        match rng.randrange(5):
            case 0:
                del pieces[at]
            case 1:
                pieces.insert(at, rng.choice(pieces))
            case 2:
                pieces.insert(at, rng.choice(TALK))
            case 3:
                pieces[at] = pieces[at][: rng.randint(0, len(pieces[at]))]
            case _:
                pieces[at] = pieces[at].replace(DSML, rng.choice(["", f" {DSML}", f"{DSML} "]))
        pieces = pieces or [BLOCK]
    return rng.choice(["", *TALK]) + "".join(pieces) + rng.choice(["", *TALK])


def cut(rng: random.Random, text: str, *, spelled: float = 0.3) -> list[int]:
    """``text`` in tokens with borders anywhere; a share of the marks spelled in ordinary tokens."""
    tokens: list[int] = []
    parts = text.split(DSML)
    for index, part in enumerate(parts):
        at = rng.randint(0, len(part))
        tokens += TOKENIZER.encode_plain(part[:at]) + TOKENIZER.encode_plain(part[at:])
        if index < len(parts) - 1:
            whole = [TOKENIZER.special_id(DSML)]
            tokens += whole if rng.random() >= spelled else TOKENIZER.encode_plain(DSML)
    return tokens


@pytest.mark.parametrize("mode", ["enabled", "disabled"])
def test_what_a_model_writes_under_constraint_never_leaks(mode: str) -> None:
    rng = random.Random(f"leaks {mode}")
    request = render({"tools": TOOLS, "thinking": {"type": mode}})
    constraint = constraint_of(request, TOKENIZER, "preview")
    scripts = {}
    for first in range(10, 160):
        start = "Hm </think>" if mode == "enabled" and rng.random() < 0.7 else ""
        scripts[first] = TOKENIZER.stream_decoder.encode(start) + cut(rng, damaged(rng))
    num_calls = num_leaks = 0
    with Engine(TorchBackend(Writer(scripts))) as engine:
        handles = [
            submit(engine, constraint, seed=1, max_tokens=150, first=first, temperature=0.0)
            for first in scripts
        ]
        for handle in handles:
            outcome = handle.result(TIMEOUT_S)
            assert outcome.error is None
            reply = read(request, outcome.token_ids, outcome.finish_reason or "")
            num_leaks += DSML in reply.content + reply.reasoning
            num_calls += len(reply.calls)
    assert num_leaks == 0
    assert num_calls > 20  # the damage does not keep calls from being made


def test_a_block_cut_between_any_two_characters_is_one_call_and_no_content() -> None:
    request = render({"tools": TOOLS, "thinking": {"type": "disabled"}})
    text = "Look:" + BLOCK
    whole = read(request, TOKENIZER.stream_decoder.encode(text), "stop")
    assert whole.calls == [("f", '{"a": "x < </y>", "b": 12}')]
    encode = TOKENIZER.stream_decoder.encode
    for at in range(len(text) + 1):
        if DSML in text[max(0, at - len(DSML) + 1) : at + len(DSML) - 1]:
            continue  # the mark is one token, or it is not markup
        tokens = encode(text[:at]) + encode(text[at:])
        reply = read(request, tokens, "stop")
        assert (reply.content, reply.calls) == (whole.content, whole.calls), at


def test_a_damaged_block_that_has_begun_leaves_nothing_in_content() -> None:
    """The official parser alone: from ``<｜DSML｜`` on, nothing is content."""
    rng = random.Random("begun")
    request = render({"tools": TOOLS, "thinking": {"type": "disabled"}})
    for _ in range(300):
        text = f"Look:\n\n<{DSML}" + damaged(rng)
        reply = read(request, cut(rng, text, spelled=0.0), "stop")
        assert reply.content == "Look:"
