"""Whatever a client sends wrong gets a 4xx in the protocol's shape that says what and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_call import BODY, CHAT, NANO, call, post
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.testing.scripted_engine import ScriptedEngine


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, "ok")


@pytest.fixture(scope="module")
def app(engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard) -> Starlette:
    return create_app(engine, tokenizer, nano_card, max_body_bytes=200_000)


def refusal(response: Any, status: int) -> dict[str, Any]:
    """The error object of a refusal, its shape checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "string"),
        ({"messages": "Hi"}, 400, "messages", "sequence"),
        ({"temperature": "hot"}, 400, "temperature", "hot"),
        ({"temperature": 9}, 400, "temperature", "[0, 2]"),
        ({"n": 2}, 400, "n", "n = 1"),
        ({"max_tokens": 10_000}, 400, "max_tokens", "maximum context length is 8192"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, 400, "messages", "8192"),
        ({"model": "gpt-5"}, 404, "model", "you passed gpt-5"),
        (
            {"response_format": {"type": "regex", "regex": "("}},
            400,
            "response_format.regex",
            "cannot be enforced",
        ),
        ({"stream_options": {}, "stream": False}, 400, "stream_options", "stream = true"),
    ],
)
def test_wrong_field(
    app: Starlette, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    error = refusal(post(app, **fields), status)
    assert error["param"] == param
    assert words in error["message"]


def test_too_long_prompt_has_openais_code(app: Starlette) -> None:
    error = refusal(post(app, messages=[{"role": "user", "content": "x " * 9000}]), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\x00", b'{"model": NaN}', b"[" * 100_000]
)
def test_body_that_is_no_request(app: Starlette, content: bytes) -> None:
    assert "invalid JSON" in refusal(call(app, "POST", CHAT, content=content), 400)["message"]


def test_oversized_body_is_refused_declared_or_not(app: Starlette) -> None:
    padding = {**BODY, "user": "x" * 200_000}
    assert refusal(post(app, **padding), 413)["code"] == "request_too_large"

    async def trickle() -> Any:
        for _ in range(50):
            yield b" " * 10_000

    error = refusal(call(app, "POST", CHAT, content=trickle()), 413)
    assert "200000 bytes" in error["message"]


@pytest.mark.parametrize("length", ["-5", "abc", "9" * 30, "٣"])
def test_lying_content_length_is_no_server_error(app: Starlette, length: str) -> None:
    headers = [(b"content-length", length.encode())]
    response = call(app, "POST", CHAT, content=json.dumps(BODY), headers=headers)
    assert response.status_code in (200, 413)


def test_wrong_path_and_method(app: Starlette) -> None:
    assert refusal(call(app, "GET", "/v1/nothing"), 404)["code"] == "not_found"
    response = call(app, "GET", CHAT)
    assert refusal(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert "GET" in response.json()["error"]["message"]
    assert refusal(call(app, "DELETE", "/v1/models"), 405)["code"] == "method_not_allowed"


def test_refused_requests_never_reach_the_engine(app: Starlette, engine: ScriptedEngine) -> None:
    before = len(engine.requests)
    for fields in ({"n": 3}, {"model": "x"}, {"messages": []}, {"top_k": -2}):
        assert post(app, **fields).status_code in (400, 404)
    assert len(engine.requests) == before


def test_models_and_health(app: Starlette) -> None:
    (entry,) = call(app, "GET", "/v1/models").json()["data"]
    assert entry["id"] == "nano-flash"
    assert entry["object"] == "model"
    assert entry["context_length"] == 8192
    assert call(app, "GET", "/v1/models/nano-flash").json() == entry
    assert refusal(call(app, "GET", "/v1/models/a/b"), 404)["param"] == "model"
    health = call(app, "GET", "/health").json()
    assert health == {"status": "ok", "model": "nano-flash", "num_running": 0, "num_waiting": 0}


# ---- anything at all --------------------------------------------------------------------------
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "function", "name"]), inner)
    ),
    max_leaves=6,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        (
            *("messages", "model", "stream", "tools", "tool_choice", "stop", "thinking", "n"),
            *("reasoning_effort", "temperature", "max_tokens", "logprobs", "response_format"),
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


@settings(max_examples=100, deadline=None)
@given(fields=FIELDS, mutilate=st.integers(0, 60) | st.none())
def test_no_body_is_a_server_error(
    fuzzed: Starlette, fields: dict[str, Any], mutilate: int | None
) -> None:
    content = json.dumps({**BODY, **fields}).encode()
    if mutilate is not None:
        content = content[:mutilate] + content[mutilate + 1 :]
    response = call(fuzzed, "POST", CHAT, content=content)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        refusal(response, response.status_code)
