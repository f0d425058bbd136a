"""What constraints allow, refuse and force, token by token, without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rorqual.errors import EngineError, RequestError
from rorqual.protocol.constraint import AnswerConstraint, ConstraintSpec, build_constraint
from rorqual.protocol.tokenizer import DSML, THINK_END, Tokenizer


def function(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = function(
    "weather",
    type="object",
    properties={
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
    },
    required=["city"],
)


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` with added tokens where it spells them."""
    return list(tokenizer.stream_decoder.encode(text))


def is_allowed(constraint: AnswerConstraint, token: int) -> bool:
    mask = constraint.mask()
    if mask is not None and not (len(mask) > token // 8 and mask[token // 8] >> (token % 8) & 1):
        return False
    return token not in constraint.forbidden()


def refused_at(tokenizer: Tokenizer, spec: ConstraintSpec | None, tokens: list[int]) -> str | None:
    """The text from the first token that is not allowed; None if all are."""
    assert spec is not None
    constraint = spec.start()
    for at, token in enumerate(tokens):
        if constraint.finish_reason is not None or not is_allowed(constraint, token):
            return tokenizer.decode(tokens[at:])
        constraint.accept(token)
    return None


def parameter(name: str, value: str, is_string: bool = True) -> str:
    flag = "true" if is_string else "false"
    return f'<{DSML}parameter name="{name}" string="{flag}">{value}</{DSML}parameter>'


def call(name: str, *parameters: str) -> str:
    return "\n".join([f'<{DSML}invoke name="{name}">', *parameters, f"</{DSML}invoke>"])


def block(*calls: str) -> str:
    return "\n".join([f"\n\n<{DSML}tool_calls>", *calls, f"</{DSML}tool_calls>"])


OSLO = parameter("city", "Oslo")
ACCEPTED = [
    block(call("weather", OSLO)),
    block(call("weather", OSLO, parameter("days", "3", False), parameter("unit", "F"))),
    block(call("weather", parameter("unit", "C"), parameter("days", "-3", False), OSLO)),
    block(call("weather", parameter("city", ' </b> "x"\n\n')), call("weather", OSLO)),
    block(call("weather", parameter("city", ""))),
]
REFUSED = [
    block(call("wether", OSLO)),
    block(call("weather")),
    block(call("weather", parameter("days", "3", False))),
    block(call("weather", OSLO, OSLO)),
    block(call("weather", OSLO, parameter("unit", "K"))),
    block(call("weather", OSLO, parameter("days", "3.5", False))),
    block(call("weather", OSLO, parameter("days", "3", True))),
    block(call("weather", OSLO, parameter("country", "Norway"))),
    block(call("weather", OSLO)) + " ",
    block(),
    block(call("weather", OSLO)).replace("tool_calls", "tool_call"),
    block(call("weather", OSLO)).replace(f"</{DSML}parameter>", f"</{DSML}invoke>", 1),
]


@pytest.mark.parametrize("text", ACCEPTED)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_well_formed_blocks_are_allowed_and_complete(
    tokenizer: Tokenizer, text: str, choice: str
) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], tool_choice=choice, thinking=False)
    before = "Let me see." if choice == "auto" else ""
    assert refused_at(tokenizer, spec, encoded(tokenizer, before + text)) is None
    assert spec is not None
    constraint = spec.start()
    for token in encoded(tokenizer, before + text):
        constraint.accept(token)
    assert constraint.finish_reason == "stop"


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_inside_a_block(tokenizer: Tokenizer, text: str) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False)
    assert refused_at(tokenizer, spec, encoded(tokenizer, text)) is not None


def test_the_opened_block_of_the_prompt_is_continued(tokenizer: Tokenizer) -> None:
    spec = build_constraint(
        tokenizer, tools=[WEATHER], tool_choice="required", thinking=False, block_is_open=True
    )
    text = block(call("weather", OSLO)).removeprefix(f"\n\n<{DSML}tool_calls>\n")
    assert refused_at(tokenizer, spec, encoded(tokenizer, text)) is None


def test_v41_has_its_own_tags(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False, generation="v4.1")
    text = block(call("weather", OSLO))
    assert refused_at(tokenizer, spec, encoded(tokenizer, text)) is not None
    for tag in ("invoke", "parameter"):
        text = text.replace(f"{DSML}{tag}", f"{DSML} {tag}")
    text = text.replace("tool_calls", " calls")
    assert refused_at(tokenizer, spec, encoded(tokenizer, text)) is None


def test_the_number_of_calls_is_bounded(tokenizer: Tokenizer) -> None:
    two = encoded(tokenizer, block(call("weather", OSLO), call("weather", OSLO)))
    for options, is_refused in (
        ({}, False),
        ({"parallel_tool_calls": False}, True),
        ({"max_calls": 1}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, True),
    ):
        spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False, **options)  # type: ignore[arg-type]
        assert (refused_at(tokenizer, spec, two) is not None) == is_refused


def test_a_block_too_long_ends_with_length(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False, max_block_tokens=20)
    assert spec is not None
    constraint = spec.start()
    followed = 0
    for token in encoded(tokenizer, block(call("weather", parameter("city", "word " * 50)))):
        if constraint.finish_reason is not None:
            break
        constraint.accept(token)
        followed += 1
    assert constraint.finish_reason == "length"
    assert followed < 30


# ---- free text --------------------------------------------------------------------------------
def test_free_text_has_no_mask_and_no_stray_markup(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False)
    dsml = tokenizer.special_id(DSML)
    for before, may_open in (("a", False), ("a <", True), ("a </", False), ("1 << 2", False)):
        assert spec is not None
        constraint = spec.start()
        for token in tokenizer.encode_plain(before):
            assert constraint.mask() is None
            constraint.accept(token)
        assert is_allowed(constraint, dsml) == may_open
        assert is_allowed(constraint, tokenizer.eos_id)


@pytest.mark.parametrize("text", [DSML, f"<{DSML}", f"x{DSML[0]}{DSML}", f"</{DSML}invoke>"])
def test_markup_cannot_be_spelled_out_in_ordinary_tokens(tokenizer: Tokenizer, text: str) -> None:
    for options in ({}, {"tool_choice": "required"}):
        spec = build_constraint(tokenizer, tools=[WEATHER], thinking=False, **options)  # type: ignore[arg-type]
        start = encoded(tokenizer, block(call("weather", parameter("city", "#"))).split("#")[0])
        left = refused_at(tokenizer, spec, start * bool(options) + tokenizer.encode_plain(text))
        assert left is not None
        assert DSML.encode()[-1:] in left.encode("utf-8", "replace") or "\ufffd" in left


def test_ending_inside_the_reasoning_is_not_allowed(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], thinking=True)
    assert spec is not None
    constraint = spec.start()
    assert not is_allowed(constraint, tokenizer.eos_id)
    constraint.accept(tokenizer.think_end_id)
    assert is_allowed(constraint, tokenizer.eos_id)


def test_a_required_call_waits_for_the_end_of_the_reasoning(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, tools=[WEATHER], tool_choice="required", thinking=True)
    text = block(call("weather", OSLO))
    assert refused_at(tokenizer, spec, encoded(tokenizer, "Hm" + text)) is not None
    assert refused_at(tokenizer, spec, encoded(tokenizer, f"Hm{THINK_END}{text}")) is None
    assert refused_at(tokenizer, spec, encoded(tokenizer, f"Hm{THINK_END}Hi")) == "Hi"


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_spent_budget_leaves_only_the_end_of_the_reasoning(
    tokenizer: Tokenizer, budget: int
) -> None:
    spec = build_constraint(tokenizer, thinking=True, max_thinking_tokens=budget)
    assert spec is not None
    constraint = spec.start()
    for token in tokenizer.encode_plain("one two three four five six")[:budget]:
        assert constraint.mask() is None
        constraint.accept(token)
    allowed = [t for t in range(tokenizer.vocab_size) if is_allowed(constraint, t)]
    assert allowed == [tokenizer.think_end_id]


def test_nothing_to_obey_is_no_constraint(tokenizer: Tokenizer) -> None:
    assert build_constraint(tokenizer, thinking=True) is None
    assert build_constraint(tokenizer, thinking=False, max_thinking_tokens=5) is None
    assert build_constraint(tokenizer, thinking=False, response_format={"type": "text"}) is None


# ---- response formats -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"type": "json_object"}, '{"a": [1, null]}', "[1]"),
        ({"type": "regex", "regex": "^a+/b$"}, "aa/b", "ab"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"enum": ["x", 1]}, "strict": True}},
            '"x"',
            '"y"',
        ),
        (
            {"type": "json_schema", "schema": {"type": "array", "items": {"type": "null"}}},
            "[null]",
            "[1]",
        ),
    ],
)
def test_formats(tokenizer: Tokenizer, wanted: dict[str, Any], good: str, bad: str) -> None:
    spec = build_constraint(tokenizer, thinking=False, response_format=wanted)
    assert refused_at(tokenizer, spec, tokenizer.encode_plain(good)) is None
    assert refused_at(tokenizer, spec, tokenizer.encode_plain(bad)) is not None
    with_tools = build_constraint(
        tokenizer, thinking=False, response_format=wanted, tools=[WEATHER]
    )
    assert refused_at(tokenizer, with_tools, tokenizer.encode_plain(good)) is None
    assert refused_at(tokenizer, with_tools, encoded(tokenizer, ACCEPTED[0])) is None
    assert refused_at(tokenizer, with_tools, tokenizer.encode_plain("Sure!")) is not None


def test_a_prefix_counts_as_part_of_the_format(tokenizer: Tokenizer) -> None:
    wanted = {"type": "json_object"}
    spec = build_constraint(
        tokenizer, thinking=False, response_format=wanted, content_prefix='{"a": '
    )
    assert refused_at(tokenizer, spec, tokenizer.encode_plain("1}")) is None
    assert refused_at(tokenizer, spec, tokenizer.encode_plain('{"b": 1}}')) is None
    with pytest.raises(RequestError, match="prefix"):
        build_constraint(tokenizer, thinking=False, response_format=wanted, content_prefix="Sure")


def test_a_token_outside_the_grammar_is_an_error_not_a_crash(tokenizer: Tokenizer) -> None:
    spec = build_constraint(tokenizer, thinking=False, response_format={"type": "json_object"})
    assert spec is not None
    constraint = spec.start()
    with pytest.raises(EngineError, match="grammar"):
        constraint.accept(tokenizer.encode_plain("x")[0])


# ---- schemas ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["a b", 'q"t', "back\\slash", "<x>", "tab\t", DSML, "日本", "a.b-c"]
)
def test_any_parameter_name_can_be_written(tokenizer: Tokenizer, name: str) -> None:
    tool = function(type="object", properties={name: {"type": "null"}}, required=[name])
    spec = build_constraint(
        tokenizer, tools=[tool], tool_choice="required", thinking=False, parallel_tool_calls=False
    )
    assert spec is not None
    constraint = spec.start()
    text = ""
    while constraint.finish_reason is None:
        token = next(t for t in range(tokenizer.vocab_size) if is_allowed(constraint, t))
        constraint.accept(token)
        text += tokenizer.decode([token])
    written = text.split('parameter name="')[1].split('" string=')[0]
    assert json.loads(f'"{written}"') == name
    assert " " not in written


@pytest.mark.parametrize(
    ("tool", "path"),
    [
        (function(type="array"), "tools[0].function.parameters.type"),
        (function(type="object", properties=[1]), "tools[0].function.parameters.properties"),
        (
            function(type="object", properties={"a": 3}),
            "tools[0].function.parameters.properties.a",
        ),
        (
            function(type="object", properties={"a": {"type": "strng"}}),
            "tools[0].function.parameters.properties.a",
        ),
        (
            function(type="object", properties={"a": {"$ref": "#/$defs/none"}}),
            "tools[0].function.parameters.properties.a",
        ),
        (function(type="object", required="a"), "tools[0].function.parameters.required"),
        (
            function(type="object", properties={}, required=["a"], additionalProperties=False),
            "tools[0].function.parameters.required",
        ),
        ({"type": "function", "function": {"name": ""}}, "tools[0].function.name"),
        ({"type": "function", "function": 7}, "tools[0].function"),
    ],
)
def test_a_malformed_schema_is_the_clients_mistake_with_its_path(
    tokenizer: Tokenizer, tool: dict[str, Any], path: str
) -> None:
    with pytest.raises(RequestError) as caught:
        build_constraint(tokenizer, tools=[tool], thinking=False)
    assert caught.value.param == path
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "regex", "regex": "("}, "response_format.regex"),
        ({"type": "regex"}, "response_format.regex"),
        ({"type": "json_schema", "json_schema": {}}, None),
        (
            {"type": "json_schema", "json_schema": {"schema": 3}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "strng"}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_malformed_format_is_the_clients_mistake_with_its_path(
    tokenizer: Tokenizer, wanted: dict[str, Any], path: str | None
) -> None:
    if path is None:
        assert build_constraint(tokenizer, response_format=wanted, thinking=False) is not None
        return
    with pytest.raises(RequestError) as caught:
        build_constraint(tokenizer, response_format=wanted, thinking=False)
    assert caught.value.param == path


def test_choices_that_cannot_be_met_are_refused(tokenizer: Tokenizer) -> None:
    for tools, choice in (
        ([], "required"),
        ([WEATHER], {"type": "function", "function": {"name": "nope"}}),
        ([WEATHER], "sometimes"),
    ):
        with pytest.raises(RequestError) as caught:
            build_constraint(tokenizer, tools=tools, tool_choice=choice, thinking=False)  # type: ignore[arg-type]
        assert caught.value.param == "tool_choice"


def test_what_cannot_be_enforced_is_left_to_a_lenient_tool_and_refused_for_a_strict_one(
    tokenizer: Tokenizer,
) -> None:
    tool = function(
        type="object",
        properties={
            "a": {"type": "object", "properties": {"b": {"type": "string", "format": "odd"}}}
        },
    )
    assert build_constraint(tokenizer, tools=[tool], thinking=False) is not None
    tool["function"]["strict"] = True
    with pytest.raises(RequestError) as caught:
        build_constraint(tokenizer, tools=[tool], thinking=False)
    assert caught.value.param == "tools[0].function.parameters.properties.a"


ITSELF = {"$ref": "#/properties/a"}
DEEPER = {
    f"d{i}": {"type": "object", "allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 30} for i in range(8)
}


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"anyOf": [ITSELF, {"type": "string"}]}}, "required": ["a"]},
        {"properties": {"a": {"anyOf": [{"anyOf": [{"type": "string"}] * 30}] * 30}}},
        {"anyOf": [{"$ref": "#"}] * 30},
        {"allOf": [{"$ref": "#"}] * 30},
        {"allOf": [{"$ref": "#/$defs/d0"}], "$defs": {**DEEPER, "d8": {"type": "object"}}},
    ],
    ids=["itself-or-text", "wide", "any-of-itself", "all-of-itself", "deep"],
)
def test_a_schema_that_multiplies_is_read_in_bounded_work(
    tokenizer: Tokenizer, parameters: dict[str, Any]
) -> None:
    tools = [function(type="object", **parameters)]
    spec = build_constraint(tokenizer, tools=tools, tool_choice="required", thinking=False)
    assert spec is not None
    assert len(spec.answer or "") in range(1, 20_000)


@pytest.mark.parametrize(
    "part",
    [
        ITSELF,
        {"anyOf": [ITSELF] * 8},
        {"type": "array", "items": {"$ref": "#/$defs/x"}},
        {"type": "object", "properties": {"b": {"allOf": [{"$ref": "#/$defs/y"}]}}},
    ],
    ids=["itself", "alternatives", "items", "two-together"],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_part_that_is_nothing_but_itself_is_refused_before_anything_runs(
    tokenizer: Tokenizer, part: dict[str, Any], strict: bool
) -> None:
    definitions = {
        "x": {"oneOf": [{"$ref": "#/$defs/x"}]},
        "y": {"$ref": "#/$defs/z"},
        "z": {"description": "y again", "$ref": "#/$defs/y"},
    }
    schema = {"type": "object", "properties": {"a": part}, "$defs": definitions}
    tool = function(**schema)
    tool["function"]["strict"] = strict
    with pytest.raises(RequestError, match="nothing but itself") as caught:
        build_constraint(tokenizer, tools=[tool], thinking=False)
    assert caught.value.param == "tools[0].function.parameters.properties.a"
    wanted = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
    with pytest.raises(RequestError, match="nothing but itself"):
        build_constraint(tokenizer, response_format=wanted, thinking=False)
    schema["properties"] = {"a": {"type": "string"}}  # then nothing leads there
    tool["function"]["parameters"] = schema
    assert build_constraint(tokenizer, tools=[tool], thinking=False)


def test_alternatives_of_an_alternative_are_written_raw(tokenizer: Tokenizer) -> None:
    unit = {"anyOf": [{"const": "C"}, {"oneOf": [{"const": "F"}, {"type": "integer"}]}]}
    tools = [function(type="object", properties={"unit": unit})]
    spec = build_constraint(tokenizer, tools=tools, tool_choice="required", thinking=False)
    for value, is_string, is_right in [("F", True, True), ("7", False, True), ("K", True, False)]:
        block = call("f", parameter("unit", value, is_string))
        text = f"\n\n<{DSML}tool_calls>\n{block}\n</{DSML}tool_calls>"
        refused = refused_at(tokenizer, spec, encoded(tokenizer, text))
        assert (refused is None) == is_right, value


def test_tools_whose_references_add_up_are_refused(tokenizer: Tokenizer) -> None:
    many = {
        f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": i + 1}
        for i in range(40)
    }
    shared = {"x": {"type": "string"}, "large": {"enum": ["x" * 500_000]}}
    tools = [function(type="object", properties=many, **{"$defs": shared})]
    with pytest.raises(RequestError, match="too large"):
        build_constraint(tokenizer, tools=tools, thinking=False)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"type": "regex", "regex": r"[^\s\S]"}, "no answer is valid"),
        ({"type": "regex", "regex": "(a{1000}){1000}"}, "cannot be enforced"),
    ],
    ids=["nothing", "too-much"],
)
def test_a_format_nothing_can_follow_is_refused_before_it_runs(
    tokenizer: Tokenizer, wanted: dict[str, Any], problem: str
) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match=problem) as failure:
            build_constraint(tokenizer, response_format=wanted, thinking=False)
        assert failure.value.param == "response_format"


BIG = "1" + "2" * 18


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"type": "integer"}, ["0", "-5", BIG, f"-{BIG}"], ["30" * 12, "-" + "30" * 12]),
        ({"type": ["integer", "null"]}, ["null", BIG], ["30" * 12]),
        ({"type": "integer", "minimum": 3}, ["3", BIG], ["2", "30" * 12]),
        ({"type": "integer", "exclusiveMaximum": 3}, ["2", f"-{BIG}"], ["3", "-" + "30" * 12]),
        ({"type": "integer", "multipleOf": 7}, ["14"], ["15", "7" * 24]),
        ({"type": "integer", "enum": [91 * 10**17, 2]}, [str(91 * 10**17), "2"], ["3"]),
        ({"const": 10**30}, [str(10**30)], ["1"]),
        ({"type": "number", "minimum": 0, "maximum": 1}, ["0.123456789", "1"], ["0." + "30" * 9]),
        ({"type": "number", "minimum": 0}, ["2.5", BIG], ["30" * 12, "0." + "30" * 9]),
        ({"type": "number", "minimum": 0, "multipleOf": 0.25}, ["0.75"], ["0.3"]),
        ({"allOf": [{"type": "number", "minimum": 0}, {"multipleOf": 7}]}, ["14"], ["15"]),
        ({"type": "number"}, ["6.02e23", "-1.5E-7", "0.1234567890123"], ["1e"]),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, [BIG], ["30" * 12]),
    ],
    ids=str,
)
def test_a_number_does_not_run_away(
    tokenizer: Tokenizer, schema: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    for strict in (False, True):
        wanted = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
        spec = build_constraint(tokenizer, response_format=wanted, thinking=False)
        for text in allowed:
            assert refused_at(tokenizer, spec, encoded(tokenizer, text)) is None, text
        for text in refused:
            ids = [*encoded(tokenizer, text), tokenizer.eos_id]
            assert refused_at(tokenizer, spec, ids) is not None, text
