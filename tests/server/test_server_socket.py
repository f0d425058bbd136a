"""Over a real socket: the openai client, clients that hang up, and the whole start-up."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pytest
from asgi_call import BODY, CHAT, NANO, sse_data
from starlette.applications import Starlette

from rorqual.engine.request import Request
from rorqual.errors import ConfigError
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.connection import Connection
from rorqual.server.run import curl_line, listen, url_of, welcome
from rorqual.testing.scripted_engine import Script, ScriptedEngine

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.fixture
def serve_script(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Starlette], str]
) -> Callable[[Any], tuple[ScriptedEngine, str]]:
    """Serves a script; gives the engine and the URL."""

    def start(script: Any) -> tuple[ScriptedEngine, str]:
        engine = ScriptedEngine(tokenizer, script)
        return engine, on_socket(create_app(engine, tokenizer, nano_card))

    return start


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)


def test_openai_client_whole_streamed_and_models(
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]],
) -> None:
    _, url = serve_script("The station was built in 1981. 🐋")
    with client_of(url) as client:
        assert [model.id for model in client.models.list()] == ["nano-flash"]
        question: Any = {"model": "nano-flash", "messages": BODY["messages"]}
        whole = client.chat.completions.create(**question)
        assert whole.choices[0].message.content == "The station was built in 1981. 🐋"
        assert whole.usage is not None
        assert whole.usage.prompt_tokens > 0
        with client.chat.completions.create(**question, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert len(pieces) > 5
        assert "".join(pieces) == "The station was built in 1981. 🐋"
        logged = client.chat.completions.create(**question, logprobs=True, top_logprobs=1)
        assert logged.choices[0].logprobs is not None
        assert logged.choices[0].logprobs.content is not None


def test_openai_client_tool_round_trip(
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]], tokenizer: Tokenizer
) -> None:
    def script(request: Request) -> str:
        prompt = tokenizer.decode(request.prompt_ids)
        if "<tool_result>" not in prompt:
            return f"I look.</think>{CALL}"
        result = prompt.split("<tool_result>")[1].split("</tool_result>")[0]
        return f"I read.</think>It is {json.loads(result)['celsius']} degrees."

    engine, url = serve_script(script)
    messages: Any = [{"role": "user", "content": "How warm is Paris?"}]
    with client_of(url) as client:
        thinking: Any = {"extra_body": {"thinking": {"type": "enabled"}}, "tools": [TOOL]}
        first = client.chat.completions.create(model="nano-flash", messages=messages, **thinking)
        choice = first.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 21}'}
        messages += [choice.message.model_dump(exclude_none=True), result]
        second = client.chat.completions.create(model="nano-flash", messages=messages, **thinking)
    assert second.choices[0].message.content == "It is 21 degrees."
    assert second.choices[0].finish_reason == "stop"
    prompt = tokenizer.decode(engine.requests[1].prompt_ids)
    assert f"<think>I look.</think>{CALL}<｜end▁of▁sentence｜>" in prompt


def test_openai_client_sees_typed_errors(
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]],
) -> None:
    engine, url = serve_script(Script(text="half", error="out of memory"))
    question: Any = {"model": "nano-flash", "messages": BODY["messages"]}
    with client_of(url) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**question, n=2)
        assert bad.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**question, "model": "gpt-5"})
        with (
            pytest.raises(openai.APIError, match="the model failed on this request"),
            client.chat.completions.create(**question, stream=True) as stream,
        ):
            list(stream)
        engine.close()
        with pytest.raises(openai.InternalServerError) as closed:
            client.chat.completions.create(**question)
        assert closed.value.status_code == 503


def raw_post(url: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request by hand, so that the connection can be dropped at any moment."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_cancels_the_generation(
    stream: bool, serve_script: Callable[[Any], tuple[ScriptedEngine, str]]
) -> None:
    engine, url = serve_script(Script(text="a b c d e f g h", hold_after=3))
    connection = raw_post(url, {**BODY, "stream": stream})
    if stream:
        assert b"200 OK" in connection.recv(100)
    while not engine.handles:
        assert urllib.request.urlopen(f"{url}/health", timeout=20).status == 200
    connection.close()
    assert engine.handles[0].cancelled.wait(20)
    assert engine.wait_idle(20)
    health = json.load(urllib.request.urlopen(f"{url}/health", timeout=20))
    assert health["status"] == "ok"
    assert health["num_running"] == 0


def test_half_a_request_leaves_the_server_alive(
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]],
) -> None:
    engine, url = serve_script("ok")
    host, port = url.removeprefix("http://").split(":")
    for begun in (b"POST", b"\x00\xff\r\n\r\n", f"POST {CHAT} HTTP/1.1\r\nContent-Le".encode()):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(begun)
    with raw_post(url, BODY) as connection:
        assert b"200 OK" in connection.recv(100)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
    assert urllib.request.urlopen(f"{url}/health", timeout=20).status == 200
    assert len(engine.requests) == 1


HALF = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Le"


@pytest.mark.parametrize(("begun", "after_an_answer"), [(b"", False), (HALF, False), (HALF, True)])
def test_a_client_that_never_finishes_asking_is_cut_off(
    begun: bytes,
    after_an_answer: bool,
    monkeypatch: pytest.MonkeyPatch,
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]],
) -> None:
    monkeypatch.setattr(Connection, "header_timeout_s", 0.3)
    _, url = serve_script("ok")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        if after_an_answer:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in connection.recv(4096)
        connection.sendall(begun)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
    with raw_post(url, {**BODY, "stream": True}) as connection:
        assert b"200 OK" in connection.recv(100)


def test_an_answer_may_take_longer_than_asking(
    monkeypatch: pytest.MonkeyPatch,
    serve_script: Callable[[Any], tuple[ScriptedEngine, str]],
) -> None:
    monkeypatch.setattr(Connection, "header_timeout_s", 0.3)
    script = Script(text="a b c d", hold_after=2)
    _, url = serve_script(script)
    with raw_post(url, BODY) as connection:
        time.sleep(0.8)
        script.release.set()
        assert b"200 OK" in connection.recv(100)


# ---- start-up ---------------------------------------------------------------------------------
SERVE = """
import sys
from pathlib import Path
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.run import serve
from rorqual.testing.scripted_engine import ScriptedEngine

model = Path(sys.argv[1])
tokenizer = Tokenizer.from_dir(model)
with ScriptedEngine(tokenizer, "In 1981.") as engine:
    serve(engine, tokenizer, ModelCard.from_dir(model), port=0)
print("closed")
"""


def test_served_process_answers_its_own_curl_line_and_stops_on_interrupt() -> None:
    command = [sys.executable, "-u", "-c", SERVE, str(NANO)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("curl"):
            lines.append(process.stdout.readline())
            assert lines[-1], "ended before printing its curl line"
        words = shlex.split(lines[-1])
        request = urllib.request.Request(
            words[2], words[words.index("-d") + 1].encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            events = sse_data(response.read().decode())
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(20) == 0
    assert "nano-flash is served at http://127.0.0.1:" in lines[0]
    assert "".join(e["choices"][0]["delta"]["content"] for e in events[:-1]) == "In 1981."
    assert events[-1] == "[DONE]"
    assert "closed" in rest


def test_busy_and_impossible_addresses_are_named() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:99999"):
        listen("127.0.0.1", 99_999)


def test_welcome_shows_the_cards_example(nano_card: ModelCard) -> None:
    with listen("0.0.0.0", 0) as listener:
        url = url_of(listener)
    assert url.startswith("http://127.0.0.1:")
    card = ModelCard(
        name="m", generation="ga", context_length=100, example='It\'s a "document".\n\nWho?'
    )
    words = shlex.split(curl_line(card, url))
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": card.example}]
    assert body["stream"] is True
    assert curl_line(nano_card, url) in welcome(nano_card, url)
