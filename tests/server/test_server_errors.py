"""Each error has one row in one table, and every protocol tells it in its own shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_call import BODY, NANO, call
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

import rorqual.errors
from rorqual.engine.request import Request
from rorqual.errors import (
    EngineClosedError,
    EngineError,
    EngineOverloadedError,
    PromptTooLongError,
    RequestError,
    RorqualError,
    UnknownModelError,
)
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.failures import ERRORS, Failure, Wire, failure_of, wire_of
from rorqual.testing.scripted_engine import Script, ScriptedEngine

WIRES: list[Wire] = ["chat", "messages", "responses", "completions"]
PATHS: dict[Wire, str] = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "completions": "/v1/completions",
}
SMALLEST: dict[Wire, dict[str, Any]] = {
    "chat": BODY,
    "messages": {**BODY, "max_tokens": 50},
    "responses": {"model": "nano-flash", "input": "Hi"},
    "completions": {"model": "nano-flash", "prompt": "Hi"},
}
RAISED: list[tuple[Exception, str]] = [
    (RequestError("m", param="a.b"), "invalid_request_error"),
    (PromptTooLongError("m", param="messages"), "context_length_exceeded"),
    (UnknownModelError("m", param="model"), "model_not_found"),
    (EngineOverloadedError("m"), "engine_overloaded"),
    (EngineClosedError("m"), "engine_closed"),
    (EngineError("m"), "engine_error"),
    (HTTPException(400, "m"), "invalid_request_error"),
    (HTTPException(401, "m"), "invalid_api_key"),
    (HTTPException(403, "m"), "permission_denied"),
    (HTTPException(404, "m"), "not_found"),
    (HTTPException(405, "m"), "method_not_allowed"),
    (HTTPException(408, "m"), "request_timeout"),
    (HTTPException(413, "m"), "request_too_large"),
    (HTTPException(429, "m"), "rate_limit_exceeded"),
    (HTTPException(503, "m"), "unavailable"),
    (ZeroDivisionError("secret"), "internal_error"),
]


def checked(wire: Wire, code: str, status: int, body: Any) -> dict[str, Any]:
    """The error in a body, whose shape and place in the table are right."""
    row = ERRORS[code]
    if wire == "messages":
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
        assert body["error"]["type"] == row.anthropic_type
        assert status == (row.anthropic_status or row.status)
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (body["error"]["code"], body["error"]["type"]) == (code, row.type)
        assert status == row.status
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def test_every_row_has_a_cause_and_every_cause_a_row() -> None:
    assert {code for _, code in RAISED} == set(ERRORS)
    requests = {c for c in vars(rorqual.errors).values() if isinstance(c, type)}
    for kind in requests:
        if issubclass(kind, RequestError | EngineError) and issubclass(kind, RorqualError):
            assert failure_of(kind("m")).code in ERRORS


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("error", "code"), RAISED, ids=lambda value: getattr(value, "code", ""))
def test_row_is_told_in_the_protocols_shape(wire: Wire, error: Exception, code: str) -> None:
    failure = failure_of(error)
    assert failure.code == code
    response = failure.response(wire)
    body = json.loads(bytes(response.body))
    told = checked(wire, code, response.status_code, body)
    assert "secret" not in told["message"]
    events = failure.events(wire, "id-1", 7)
    assert all(json.loads(event.data) for event in events)
    if wire == "responses":
        assert [json.loads(event.data)["sequence_number"] for event in events] == [7, 8]
        assert [event.name for event in events] == ["error", "response.failed"]
    else:
        assert [event.name for event in events] == ["error" if wire == "messages" else None]
        assert json.loads(events[0].data) == body


def test_paths_belong_to_protocols() -> None:
    for path in ("/v1/messages", "/anthropic/v1/messages", "/v1/messages/count_tokens"):
        assert wire_of(path) == "messages"
    for path in ("/v1/chat/completions", "/v1/responses", "/nothing", "/"):
        assert wire_of(path) == "chat"


@pytest.fixture(scope="module")
def app(tokenizer: Tokenizer, nano_card: ModelCard) -> Iterator[Starlette]:
    with ScriptedEngine(tokenizer, "ok") as engine:
        yield create_app(engine, tokenizer, nano_card)


@pytest.mark.parametrize("wire", WIRES)
def test_the_smallest_body_is_answered(app: Starlette, wire: Wire) -> None:
    assert call(app, "POST", PATHS[wire], json=SMALLEST[wire]).status_code == 200


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "invalid JSON"),
        (b'{"model": ', "line 1 column"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "nano-flash", "temperature": NaN}', "NaN"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "invalid JSON"),
        (b"\xff\xfe{}", "invalid JSON"),
        (b"{}", "missing"),
    ],
)
def test_malformed_json_is_told_where(
    app: Starlette, wire: Wire, content: bytes, words: str
) -> None:
    response = call(app, "POST", PATHS[wire], content=content)
    error = checked(wire, "invalid_request_error", response.status_code, response.json())
    assert words in error["message"]


ADDING = {
    "role": "system",
    "content": [
        {"type": "tool_addition", "tool": {"definition": {"name": "g", "input_schema": {}}}}
    ],
}
WRONG: list[tuple[Wire, dict[str, Any], str]] = [
    ("messages", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "wat"}]}]}, "messages[0]"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("messages", {"messages": "Hi"}, "messages"),
    ("messages", {"max_tokens": -1}, "max_tokens"),
    ("messages", {"max_tokens": 10**40}, "max_tokens"),
    ("messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ("messages", {"tools": [{"name": "f", "input_schema": 5}]}, "tools"),
    ("messages", {"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ("messages", {"tools": [{"name": {"a": 1}}], "messages": [ADDING]}, "tools[0].name"),
    ("messages", {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}, "messages[0]"),
    ("responses", {"input": 5}, "input"),
    ("responses", {"input": [{"role": "user", "content": "\udfff"}]}, "input[0].content"),
    ("responses", {"tools": [{"type": "function", "name": "\ud800"}]}, "tools[0].name"),
    ("responses", {"input": []}, "Input items"),
    ("responses", {"input": [{"role": "user", "content": {"a": 1}}]}, "input[0]"),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("responses", {"max_output_tokens": 10**6}, "max_output_tokens"),
    ("responses", {"max_output_tokens": 9000}, "maximum context length"),
    ("responses", {"text": {"format": {"type": "zz"}}}, "text"),
    ("responses", {"reasoning": {"effort": "zz"}}, "reasoning.effort"),
    ("responses", {"previous_response_id": "x"}, "previous_response_id"),
    ("completions", {"prompt": 5}, "prompt"),
    ("completions", {"prompt": ["a", "b"]}, "prompt"),
    ("completions", {"prompt": "\ud800"}, "prompt"),
    ("completions", {"prompt": ["a\udc00b"]}, "prompt[0]"),
    ("completions", {"prompt": "x " * 9000}, "maximum context length"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"suffix": "x", "max_tokens": 5000}, "max_tokens"),
    ("completions", {"n": 2}, "n"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"top_p": 0}, "top_p"),
    ("completions", {"temperature": "hot"}, "temperature"),
    ("completions", {"stop": ["a", ""]}, "stop"),
    ("completions", {"stop": ["\ud800"]}, "stop"),
    ("completions", {"\ud800": 1}, "surrogate"),
    ("completions", {"thinking": {"type": "enabled"}}, "think"),
]


PREFIX = {"role": "assistant", "content": "x", "prefix": True}


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    parameters = parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "function",
        "function": {"name": name, "strict": True, "parameters": parameters},
    }


@pytest.mark.parametrize(("wire", "fields", "words"), WRONG)
def test_wrong_field_is_told_what_and_where(
    app: Starlette, wire: Wire, fields: dict[str, Any], words: str
) -> None:
    content = json.dumps({**SMALLEST[wire], **fields}).encode()
    response = call(app, "POST", PATHS[wire], content=content)
    code = "context_length_exceeded" if "maximum" in words else "invalid_request_error"
    error = checked(wire, code, response.status_code, response.json())
    assert words in error["message"]


STRICT_WITHOUT = {"type": "object", "properties": {}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [function("f"), function("g", STRICT_WITHOUT)]}, "tools[1]"),
        ({"tools": [function("f"), function("g", {"type": "string"})]}, "tools[1]"),
        (
            {
                "tools": [function("f")],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "what"}},
                },
            },
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "a"}] * 2 + [PREFIX, PREFIX]}, "messages"),
    ],
)
def test_a_schema_or_message_the_conversion_refuses_is_found(
    app: Starlette, fields: dict[str, Any], param: str
) -> None:
    response = call(app, "POST", PATHS["chat"], json={**BODY, **fields})
    error = checked("chat", "invalid_request_error", response.status_code, response.json())
    assert error["param"] == param


@pytest.mark.parametrize("wire", WIRES)
def test_an_error_repeats_little_of_a_long_text(app: Starlette, wire: Wire) -> None:
    for fields in ({"temperature": "x" * 100_000}, {"stream": {"y" * 100_000: "\ud800"}}):
        content = json.dumps({**SMALLEST[wire], **fields}).encode()
        response = call(app, "POST", PATHS[wire], content=content)
        error = checked(wire, "invalid_request_error", response.status_code, response.json())
        assert next(iter(fields)) in error["message"]
        assert len(response.text) < 3000


@pytest.mark.parametrize("wire", WIRES)
def test_an_unknown_model_an_engine_that_is_full_fails_or_is_closed(
    tokenizer: Tokenizer, nano_card: ModelCard, wire: Wire
) -> None:
    def failing(_: Request) -> Script:
        return Script(text="half", error="the disk is on fire")

    engine = ScriptedEngine(tokenizer, failing)
    app = create_app(engine, tokenizer, nano_card)

    def answer(**fields: Any) -> Any:
        return call(app, "POST", PATHS[wire], json={**SMALLEST[wire], **fields})

    unknown = answer(model="gpt-5")
    checked(wire, "model_not_found", unknown.status_code, unknown.json())
    failed = answer()
    checked(wire, "engine_error", failed.status_code, failed.json())
    engine.close()
    closed = answer()
    checked(wire, "engine_closed", closed.status_code, closed.json())
    full = create_app(ScriptedEngine(tokenizer, "ok", max_running=0), tokenizer, nano_card)
    refused = call(full, "POST", PATHS[wire], json=SMALLEST[wire])
    checked(wire, "engine_overloaded", refused.status_code, refused.json())
    assert refused.headers["retry-after"] == "1"


def test_think_max_warns_in_a_header(app: Starlette) -> None:
    response = call(app, "POST", PATHS["chat"], json={**BODY, "reasoning_effort": "max"})
    assert response.status_code == 200
    assert "393216" in response.headers["x-rorqual-warning"]
    assert "x-rorqual-warning" not in call(app, "POST", PATHS["chat"], json=BODY).headers


def test_failure_is_plain_data() -> None:
    failure = Failure(code="not_found", message="m")
    assert (failure.status(), failure.param, dict(failure.headers)) == (404, None, {})


# ---- anything at all --------------------------------------------------------------------------
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "input",
    "id",
    "tool_use_id",
    "call_id",
    "effort",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "tool_result", "thinking", "function_call", "any"])
    | st.sampled_from(["\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        (
            *("messages", "input", "prompt", "suffix", "model", "system", "instructions", "tools"),
            *("tool_choice", "thinking", "reasoning", "output_config", "output_format", "text"),
            *("max_tokens", "max_output_tokens", "stop", "stop_sequences", "stream", "logprobs"),
            *("previous_response_id", "echo", "top_k", "top_p", "temperature", "seed", "include"),
            *("reasoning_effort", "response_format", "parallel_tool_calls", "metadata", "n"),
        )
    ),
    JSON,
    max_size=4,
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Starlette]:
    tokenizer = Tokenizer.from_dir(NANO)
    with ScriptedEngine(tokenizer, "ok") as engine:
        yield create_app(engine, tokenizer, ModelCard.from_dir(NANO))


@pytest.mark.parametrize("wire", WIRES)
@settings(max_examples=80, deadline=None)
@given(fields=FIELDS, mutilate=st.integers(0, 60) | st.none())
def test_no_body_is_a_server_error(
    fuzzed: Starlette, wire: Wire, fields: dict[str, Any], mutilate: int | None
) -> None:
    content = json.dumps({**SMALLEST[wire], **fields}).encode()
    if mutilate is not None:
        content = content[:mutilate] + content[mutilate + 1 :]
    response = call(fuzzed, "POST", PATHS[wire], content=content)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        code = error.get("code")
        if code is None:
            code = {"not_found_error": "model_not_found"}.get(error["type"], error["type"])
        checked(wire, code, response.status_code, response.json())
