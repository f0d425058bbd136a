"""Connections whose clients hold things up, and the end of a server that is still busy."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest
from asgi_call import BODY, CHAT, NANO, sse_data

from rorqual.errors import ConfigError
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.qualify.target import Target
from rorqual.server.app import Application, create_app
from rorqual.server.connection import Connection
from rorqual.server.keys import KeyRing, KeyStore, Permissions
from rorqual.server.run import check_exposure, is_loopback, listen, server_for, url_of
from rorqual.testing.scripted_engine import Script, ScriptedEngine


def connect(url: str, *, receive_buffer: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def everything(connection: socket.socket) -> bytes:
    """What arrives until the server hangs up."""
    received = b""
    try:
        while part := connection.recv(65_536):
            received += part
    except ConnectionResetError:
        pass
    return received


def error_of(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@contextmanager
def stream_of(url: str) -> Iterator[IO[bytes]]:
    headers = {"Content-Type": "application/json"}
    body = json.dumps({**BODY, "stream": True}).encode()
    request = urllib.request.Request(url + CHAT, body, headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        yield response


# ---- offers of another protocol ---------------------------------------------------------------
OFFERS = {
    "as Java's client": [
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: A",
    ],
    "websocket": ["Upgrade: websocket", "Connection: upgrade", "Sec-WebSocket-Version: 13"],
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("packet", [1, 7, 10_000])
def test_a_request_that_offers_another_protocol_is_served_with_its_body(
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Application], str],
    offer: list[str],
    packet: int,
) -> None:
    engine = ScriptedEngine(tokenizer, "ok")
    url = on_socket(create_app(engine, tokenizer, nano_card))
    plain = request_of(BODY)
    lines = "".join(f"{line}\r\n" for line in offer).encode()
    offering = plain.replace(b"Host: x\r\n", b"Host: x\r\n" + lines)
    sent = offering + plain + offering
    with connect(url) as connection:
        for start in range(0, len(sent), packet):
            connection.sendall(sent[start : start + packet])
        received = b""
        while received.count(b'"usage"') < 3:
            received += connection.recv(65_536)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert len({request.prompt_ids for request in engine.requests}) == 1


def test_this_is_no_proxy(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Application], str]
) -> None:
    url = on_socket(create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card))
    with connect(url) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        status, _ = error_of(everything(connection))
    assert status == 400


# ---- clients that hold things up --------------------------------------------------------------
def test_a_reader_that_stops_reading_is_dropped_and_its_generation_cancelled(
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Application], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "write_timeout_s", 0.3)
    # Some 1.5 MB of events, and more to come, in fewer outputs than may wait for a reader.
    script = Script(text="a " * 7000, hold_after=6000, tokens_per_output=8)
    engine = ScriptedEngine(tokenizer, script)
    url = on_socket(create_app(engine, tokenizer, nano_card))
    with connect(url, receive_buffer=4096) as connection:
        connection.sendall(request_of({**BODY, "stream": True, "max_tokens": 7500}))
        assert b"200 OK" in connection.recv(100)
        while not engine.handles:
            time.sleep(0.001)
        assert engine.handles[0].cancelled.wait(20)
        assert engine.wait_idle(20)
        assert b"[DONE]" not in everything(connection)
    assert urllib.request.urlopen(f"{url}/health", timeout=20).status == 200


def test_a_reader_too_far_behind_is_told_that_its_answer_was_given_up(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Application], str]
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a " * 7000, hold_after=6900))
    url = on_socket(create_app(engine, tokenizer, nano_card))
    received = b""
    with connect(url, receive_buffer=4096) as connection:
        connection.sendall(request_of({**BODY, "stream": True, "max_tokens": 7500}))
        while not engine.handles:
            time.sleep(0.001)
        assert engine.handles[0].cancelled.wait(20)
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65_536)
    assert b"reads too slowly" in received
    assert b"[DONE]" not in received


def test_a_reader_that_is_slow_but_reads_gets_everything(
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Application], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "write_timeout_s", 5.0)
    engine = ScriptedEngine(tokenizer, Script(text="a " * 3000, tokens_per_output=2))
    url = on_socket(create_app(engine, tokenizer, nano_card))
    received = b""
    with connect(url, receive_buffer=4096) as connection:
        connection.sendall(request_of({**BODY, "stream": True, "max_tokens": 3500}))
        while not engine.requests:
            time.sleep(0.001)
        assert engine.wait_idle(20)
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65_536)
    assert b"data: [DONE]" in received


@pytest.mark.parametrize("name", [b"x" * 100_000, b"a: b\r\n" * 20_000])
def test_endless_headers_are_refused(
    name: bytes,
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Application], str],
) -> None:
    url = on_socket(create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card))
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + name)
        received = everything(connection)
    # What was still under way when the server closed may have cost the client its answer.
    assert received == b"" or error_of(received)[0] == 431
    assert urllib.request.urlopen(f"{url}/health", timeout=20).status == 200


def test_what_is_no_http_is_answered_in_json(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Application], str]
) -> None:
    url = on_socket(create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card))
    with connect(url) as connection:
        connection.sendall(b"hello\r\n\r\n")
        assert error_of(everything(connection)) == (400, "Invalid HTTP request received.")


def test_connections_beyond_the_limit_are_closed(
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Application], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "max_connections", 2)
    url = on_socket(create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card))
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(url) as first, connect(url) as second:
        for connection in (first, second):
            connection.sendall(ask)
            assert b"200 OK" in connection.recv(4096)
        with connect(url) as third:
            assert everything(third) == b""
        first.sendall(ask)
        assert b"200 OK" in first.recv(4096)


# ---- keep-alive and the end -------------------------------------------------------------------
def test_a_stream_gets_comments_while_nothing_is_generated(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Application], str]
) -> None:
    script = Script(text="a b", hold_after=0)
    engine = ScriptedEngine(tokenizer, script)
    url = on_socket(create_app(engine, tokenizer, nano_card, keepalive_s=0.02))
    with stream_of(url) as stream:
        while stream.readline() != b": keep-alive\n":
            pass
        script.release.set()
        assert sse_data(stream.read().decode())[-1] == "[DONE]"


def test_running_answers_finish_after_sigterm_and_nobody_else_is_let_in() -> None:
    with (
        tempfile.TemporaryFile() as log,
        Target(NANO, answer="word " * 60, step_s=0.02, log=log) as target,
    ):
        with stream_of(target.url) as stream:
            assert stream.readline()
            assert target.stop() == 0
            assert stream.read().endswith(b"data: [DONE]\n\n")
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{target.url}/health", timeout=20)


def test_answers_beyond_the_limit_end_with_an_error_event(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a b c", hold_after=1))
    app = create_app(engine, tokenizer, nano_card)
    server = server_for(app, drain_s=0.2, end_running=engine.close)
    with listen("127.0.0.1", 0) as listener:
        url = url_of(listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with stream_of(url) as stream:
            assert stream.readline()
            server.should_exit = True
            text = stream.read().decode()
        thread.join(20)
    assert not thread.is_alive()
    last = json.loads(text.strip().rsplit("data: ", 1)[1])
    assert last["error"]["code"] == "engine_closed"


def test_a_second_signal_cuts_the_drain_short() -> None:
    with (
        tempfile.TemporaryFile() as log,
        Target(NANO, answer="word " * 5000, step_s=0.1, log=log) as target,
        stream_of(target.url) as stream,
    ):
        assert stream.readline()
        for _ in range(2):
            target.signal()
        assert target.wait() == 0
        assert b"engine_closed" in stream.read()


# ---- who could connect ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("", False),
        ("no such host", False),
    ],
)
def test_which_addresses_mean_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_other_addresses_need_an_active_key(tmp_path: Any) -> None:
    with KeyStore(tmp_path / "keys") as store:
        check_exposure("127.0.0.1", None)
        for keys in (None, KeyRing(store)):
            with pytest.raises(ConfigError, match=r"refusing to listen on 0\.0\.0\.0"):
                check_exposure("0.0.0.0", keys)
        store.create("ci", Permissions())
        check_exposure("0.0.0.0", KeyRing(store))
        store.revoke("ci")
        with pytest.raises(ConfigError, match="refusing"):
            check_exposure("0.0.0.0", KeyRing(store))
