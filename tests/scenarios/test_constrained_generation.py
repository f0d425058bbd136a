"""A model that babbles, held to tools, schemas, formats and budgets: what comes out is valid."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from constrained_answers import (
    CARD,
    LIKINGS,
    NANO,
    TIMEOUT_S,
    TOKENIZER,
    Babbler,
    Reply,
    read,
    render,
    serving,
    submit,
    token,
)
from generated_schemas import tool, value_schema

from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.torch_backend import TorchBackend
from rorqual.model.checkpoint import load_model
from rorqual.protocol.constraint import build_constraint, constraint_of
from rorqual.protocol.tokenizer import DSML, THINK_END

THINKING = {"thinking": {"type": "enabled"}}
NOT_THINKING = {"thinking": {"type": "disabled"}}
NO_WISH_TO_STOP = {**LIKINGS, TOKENIZER.eos_id: 0.0}
TALKER = {TOKENIZER.think_end_id: 12.0, token("<"): 11.0, TOKENIZER.eos_id: 9.0, **LIKINGS}
"""A babbler that likes to open tool blocks, closes its reasoning, and stops early."""


def assert_valid_calls(reply: Reply, tools: list[dict[str, Any]]) -> None:
    """Each call names a declared tool and its arguments fit; nothing of DSML is left over."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    for name, arguments in reply.calls:
        jsonschema.validate(json.loads(arguments), schemas[name])
    assert DSML not in reply.content + reply.reasoning


@pytest.mark.parametrize("thinking", [True, False])
def test_200_babbled_calls_over_generated_schemas_all_validate(thinking: bool) -> None:
    rng = random.Random(f"tools {thinking}")
    num_calls = 0
    with serving(Babbler(TALKER)) as ask:
        questions = []
        for seed in range(100):
            tools = [tool(rng, "first"), tool(rng, "second-tool")][: rng.randint(1, 2)]
            fields = {
                "tools": tools,
                "tool_choice": "required",
                "seed": seed,
                "limit": 4000,
                **(THINKING if thinking else NOT_THINKING),
            }
            questions.append((tools, ask(fields)))
        for tools, result in questions:
            reply = result()
            assert reply.finish_reason == "tool_calls", reply.text
            assert thinking or not reply.reasoning
            assert reply.content == ""
            assert reply.calls
            assert_valid_calls(reply, tools)
            num_calls += len(reply.calls)
    assert num_calls > 100


def test_strict_tools_get_exactly_their_schema() -> None:
    rng = random.Random("strict")
    with Engine(TorchBackend(Babbler(NO_WISH_TO_STOP))) as engine:
        waiting = []
        for seed in range(20):
            tools = [tool(rng, "f", strict=True)]
            spec = build_constraint(TOKENIZER, tools=tools, tool_choice="required", thinking=False)
            waiting.append((tools, submit(engine, spec, seed=seed, max_tokens=4000)))
        for tools, handle in waiting:
            tools[0]["function"]["strict"] = False  # the renderer refuses some strict schemas
            outcome = handle.result(TIMEOUT_S)
            assert outcome.finish_reason == "stop"
            reply = read(render({"tools": tools, **NOT_THINKING}), outcome.token_ids, "stop")
            assert_valid_calls(reply, tools)
            properties = tools[0]["function"]["parameters"]["properties"]
            assert all(json.loads(text).keys() == properties.keys() for _, text in reply.calls)


@pytest.mark.parametrize("mode", [THINKING, NOT_THINKING])
def test_with_a_free_choice_the_model_talks_or_calls_and_calls_are_valid(
    mode: Mapping[str, Any],
) -> None:
    rng = random.Random("auto")
    tools = [tool(rng, "first"), tool(rng, "second-tool")]
    with serving(Babbler(TALKER)) as ask:
        questions = [
            ask({"tools": tools, "seed": seed, "limit": 4000, **mode}) for seed in range(40)
        ]
        replies = [question() for question in questions]
    reasons = {reply.finish_reason for reply in replies}
    assert reasons == {"stop", "tool_calls"}  # both happen
    for reply in replies:
        assert_valid_calls(reply, tools)
        assert (reply.finish_reason == "tool_calls") == bool(reply.calls)


def test_one_call_only_where_parallel_calls_are_off_or_a_tool_is_named() -> None:
    rng = random.Random("one")
    tools = [tool(rng, "first"), tool(rng, "second-tool")]
    named = {"type": "function", "function": {"name": "second-tool"}}
    for choice, parallel in (("required", False), (named, True)):
        with serving(Babbler(TALKER)) as ask:
            fields = {"tools": tools, "tool_choice": choice, "limit": 4000}
            fields["parallel_tool_calls"] = parallel
            for mode in (THINKING, NOT_THINKING):
                results = [ask({**fields, **mode, "seed": seed}) for seed in range(6)]
                for reply in [result() for result in results]:
                    assert [name for name, _ in reply.calls][1:] == []
                    assert choice == "required" or reply.calls[0][0] == "second-tool"
                    assert_valid_calls(reply, tools)


def test_no_tool_block_opens_where_tools_are_declared_but_not_to_be_used() -> None:
    tools = [tool(random.Random(1), "f")]
    likings = {**TALKER, TOKENIZER.special_id(DSML): 30.0}
    with serving(Babbler(likings)) as ask:
        fields = {"tools": tools, "tool_choice": "none", "limit": 200}
        # The renderer drops the tools, so that nothing is left to constrain; the official rule.
        assert (
            constraint_of(render({"tools": tools, "tool_choice": "none"}), TOKENIZER, "ga") is None
        )
        reply = ask(fields)()
    assert reply.calls == []


# ---- response formats -------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [THINKING, NOT_THINKING])
def test_a_json_object_is_one(mode: Mapping[str, Any]) -> None:
    with serving(Babbler({**TALKER, token("{"): 9.0})) as ask:
        fields = {"response_format": {"type": "json_object"}, "limit": 4000, **mode}
        for reply in [r() for r in [ask({**fields, "seed": seed}) for seed in range(25)]]:
            assert reply.finish_reason == "stop"
            assert isinstance(json.loads(reply.content), dict)


def test_json_of_a_schema_validates() -> None:
    rng = random.Random("format")
    with serving(Babbler(TALKER)) as ask:
        questions = []
        for seed in range(40):
            schema = {
                "type": "object",
                "properties": {"a": value_schema(rng, 2), "b": value_schema(rng, 1)},
                "required": ["a"],
                "additionalProperties": False,
                "$defs": tool(rng, "x")["function"]["parameters"]["$defs"],
            }
            wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
            questions.append(
                (schema, ask({"response_format": wanted, "seed": seed, "limit": 4000, **THINKING}))
            )
        for schema, result in questions:
            reply = result()
            assert reply.finish_reason == "stop"
            jsonschema.validate(json.loads(reply.content), schema)


def test_a_regular_expression_matches() -> None:
    pattern = r"^(yes|no): [a-z]{3,12}/\d{2}$"
    with serving(Babbler(TALKER)) as ask:
        fields = {"response_format": {"type": "regex", "regex": pattern}, **NOT_THINKING}
        for reply in [r() for r in [ask({**fields, "seed": seed}) for seed in range(25)]]:
            assert reply.finish_reason == "stop"
            assert re.fullmatch(pattern, reply.content, re.ASCII)


def test_running_out_of_tokens_is_length_whatever_the_format() -> None:
    with serving(Babbler({token("["): 20.0})) as ask:
        for wanted in ({"type": "json_object"}, {"type": "regex", "regex": "x{200}"}):
            reply = ask({"response_format": wanted, "limit": 40, **NOT_THINKING})()
            assert reply.finish_reason == "length"


# ---- thinking ---------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [0, 1, 17])
def test_a_spent_thinking_budget_closes_the_reasoning_and_an_answer_follows(budget: int) -> None:
    request = render(THINKING)
    spec = build_constraint(TOKENIZER, thinking=True, max_thinking_tokens=budget)
    likings = {TOKENIZER.eos_id: 12.0}  # would rather stop than think, and never closes
    with Engine(TorchBackend(Babbler(likings))) as engine:
        for seed in range(5):
            sampling = SamplingParams(
                max_tokens=400, temperature=2.0, seed=seed, stop_token_ids=(TOKENIZER.eos_id,)
            )
            asked = Request(
                prompt_ids=(0,), sampling=sampling, request_id=str(seed), constraint=spec
            )
            tokens = engine.submit(asked).result(60).token_ids
            assert tokens.index(TOKENIZER.think_end_id) == budget
            assert THINK_END not in read(request, tokens, "stop").content


def test_a_forced_call_comes_after_the_reasoning_even_if_that_never_ends_by_itself() -> None:
    tools = [tool(random.Random(3), "f")]
    request = render({"tools": tools, "tool_choice": "required", **THINKING})
    spec = build_constraint(
        TOKENIZER, tools=tools, tool_choice="required", thinking=True, max_thinking_tokens=30
    )
    likings = {**NO_WISH_TO_STOP, TOKENIZER.think_end_id: -1e4, token("<"): 11.0}
    with Engine(TorchBackend(Babbler(likings))) as engine:
        sampling = SamplingParams(max_tokens=4000, temperature=2.0, seed=1)
        asked = Request(prompt_ids=(0,), sampling=sampling, request_id="r", constraint=spec)
        outcome = engine.submit(asked).result(60)
    reply = read(request, outcome.token_ids, "stop")
    assert outcome.token_ids.index(TOKENIZER.think_end_id) == 30
    assert reply.finish_reason == "tool_calls"
    assert_valid_calls(reply, tools)


# ---- the shipped model ------------------------------------------------------------------------
def test_nano_flash_calls_a_tool_well_formed_every_time() -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "maxLength": 20},
                        "unit": {"enum": ["C", "F"]},
                        "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    },
                    "required": ["city", "unit", "days"],
                },
            },
        }
    ]
    message = {"role": "user", "content": "What is the weather in Oslo?"}
    with Engine(TorchBackend(load_model(NANO))) as engine:
        waiting = []
        for seed in range(6):
            fields = {"messages": [message], "tools": tools, "tool_choice": "required"}
            request = render({**fields, **NOT_THINKING, "parallel_tool_calls": False})
            constraint = constraint_of(request, TOKENIZER, CARD.generation)
            sampling = SamplingParams(
                max_tokens=150,
                temperature=0.2 * seed,
                seed=seed,
                stop_token_ids=(TOKENIZER.eos_id,),
            )
            asked = Request(
                prompt_ids=request.prompt_ids,
                sampling=sampling,
                request_id=str(seed),
                constraint=constraint,
            )
            waiting.append((request, engine.submit(asked)))
        for request, handle in waiting:
            outcome = handle.result(TIMEOUT_S)
            reply = read(request, outcome.token_ids, outcome.finish_reason or "")
            assert (outcome.finish_reason, outcome.error) == ("stop", None)
            assert [name for name, _ in reply.calls] == ["get_weather"]
            assert_valid_calls(reply, tools)
