"""The doors in process: keys, permissions, limits, bounds, ids, logs, metrics, cross-origin."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from asgi_call import BODY, CHAT, call
from prometheus_client.parser import text_string_to_metric_families

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.access_log import AccessLog
from rorqual.server.app import Application, create_app
from rorqual.server.keys import KeyRing, KeyStore, Permissions
from rorqual.server.limits import Bucket
from rorqual.testing.scripted_engine import Script, ScriptedEngine

MESSAGES = "/v1/messages"
QUESTION = {"model": "nano-flash", "max_tokens": 50, "messages": BODY["messages"]}


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, Script(text="one two three", cached_tokens=1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / "keys") as store:
        yield store


def guarded(
    engine: ScriptedEngine, tokenizer: Tokenizer, card: ModelCard, store: KeyStore, **options: Any
) -> Application:
    return create_app(engine, tokenizer, card, keys=KeyRing(store, clock=iter_clock()), **options)


def iter_clock() -> Any:
    """A clock that is a second later each time, so that a ring always looks."""
    ticks = iter(range(10**9))
    return lambda: float(next(ticks))


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def ask(app: Application, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return call(app, "POST", CHAT, json={**BODY, **fields}, headers=headers or {})


# ---- keys -------------------------------------------------------------------------------------
def test_only_holders_of_a_key_are_served(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", Permissions())
    assert ask(app, bearer(text)).status_code == 200
    assert ask(app, {"x-api-key": text}).status_code == 200
    assert ask(app, {**bearer("none"), "x-api-key": text}).status_code == 200
    for headers in ({}, bearer("rq_x_y"), {"x-api-key": "any"}, {"Authorization": "Basic YTpi"}):
        response = ask(app, headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/console/stats", "/v1/nothing"):
        assert call(app, "GET", path).status_code == 401
    for path in ("/health", "/ready", "/"):
        assert call(app, "GET", path).status_code == 200
    assert len(engine.requests) == 3


def test_refusals_have_the_shape_of_the_paths_protocol(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", Permissions(modes=frozenset({"think"}), requests_per_minute=1))
    stranger = call(app, "POST", MESSAGES, json=QUESTION)
    assert stranger.status_code == 401
    assert stranger.json()["type"] == "error"
    assert stranger.json()["error"]["type"] == "authentication_error"
    refused = call(app, "POST", MESSAGES, json=QUESTION, headers={"x-api-key": text})
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    limited = call(app, "POST", MESSAGES, json=QUESTION, headers={"x-api-key": text})
    assert limited.status_code == 429
    assert limited.json()["error"]["type"] == "rate_limit_error"


def test_revoked_and_expired_keys_are_told_so_by_a_running_server(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    with KeyStore(store.path) as elsewhere:
        _, text = elsewhere.create("ci", Permissions())
        assert ask(app, bearer(text)).status_code == 200
        elsewhere.revoke("ci")
        revoked = ask(app, bearer(text))
        _, late = elsewhere.create("late", Permissions(expires_at=1.0))
        expired = ask(app, bearer(late))
    assert (revoked.status_code, expired.status_code) == (401, 401)
    assert revoked.json()["error"]["message"] == "the API key is revoked"
    assert expired.json()["error"]["message"] == "the API key is expired"


@pytest.mark.parametrize(
    ("permissions", "fields", "status"),
    [
        (Permissions(modes=frozenset({"non-think"})), {}, 200),
        (
            Permissions(modes=frozenset({"non-think"})),
            {"thinking": {"type": "enabled"}},
            403,
        ),
        (Permissions(models=frozenset({"nano-flash"})), {}, 200),
        (Permissions(models=frozenset({"nano-pro"})), {}, 403),
    ],
)
def test_keys_are_for_their_models_and_modes(
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    store: KeyStore,
    permissions: Permissions,
    fields: dict[str, Any],
    status: int,
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", permissions)
    response = ask(app, bearer(text), **fields)
    assert response.status_code == status
    assert len(engine.requests) == (status == 200)
    if status == 403:
        assert "this API key may not use" in response.json()["error"]["message"]


# ---- limits -----------------------------------------------------------------------------------
def test_requests_per_minute_with_headers_that_say_so(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", Permissions(requests_per_minute=2))
    _, other = store.create("other", Permissions())
    answers = [ask(app, bearer(text)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert remaining == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert re.fullmatch(r"\d+\.\d{3}s", answers[2].headers["x-ratelimit-reset-requests"])
    assert call(app, "GET", "/v1/models", headers=bearer(text)).status_code == 200
    unlimited = ask(app, bearer(other))
    assert unlimited.status_code == 200
    assert "x-ratelimit-limit-requests" not in unlimited.headers


def test_tokens_per_minute_are_paid_for_when_an_answer_ends(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    usage = ask(app, bearer(store.create("other", Permissions())[1])).json()["usage"]
    limit = usage["total_tokens"] + 1
    _, text = store.create("ci", Permissions(tokens_per_minute=limit))
    first, second, third = (ask(app, bearer(text)) for _ in range(3))
    assert first.headers["x-ratelimit-limit-tokens"] == str(limit)
    assert first.headers["x-ratelimit-remaining-tokens"] == str(limit)
    assert second.status_code == 200  # a token is left: it may overdraw
    assert second.headers["x-ratelimit-remaining-tokens"] in ("1", "2")
    assert third.status_code == 429
    assert f"{limit} tokens per minute" in third.json()["error"]["message"]
    assert 30 <= int(third.headers["retry-after"]) <= 61
    assert "x-ratelimit-limit-requests" not in third.headers


def test_tokens_of_a_client_that_left_are_paid_for_too(
    tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a b c", hold_after=2))
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", Permissions(tokens_per_minute=1))

    async def leave() -> None:
        left = asyncio.create_task(post_raw(app, [(b"x-api-key", text.encode())]))
        while not engine.handles:
            await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)

    asyncio.run(leave())
    assert engine.wait_idle(20)
    assert ask(app, bearer(text)).status_code == 429


def test_limits_are_told_to_clients_of_messages_in_their_words(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    app = guarded(engine, tokenizer, nano_card, store)
    _, text = store.create("ci", Permissions(requests_per_minute=1, tokens_per_minute=900))
    answers = [call(app, "POST", MESSAGES, json=QUESTION, headers=bearer(text)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    for answer in answers:
        assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert answer.headers["anthropic-ratelimit-tokens-limit"] == "900"
        for kind in ("requests", "tokens"):
            reset = answer.headers[f"anthropic-ratelimit-{kind}-reset"]
            assert datetime.fromisoformat(reset).tzinfo is not None
        assert "x-ratelimit-limit-requests" not in answer.headers


def test_bucket_refills_at_its_rate_and_never_overflows() -> None:
    bucket = Bucket(left=0.0, updated_at=0.0)
    assert bucket.wait_s(60) == 1.0
    bucket.refill(60, now=0.25)
    assert bucket.wait_s(60) == pytest.approx(0.75)
    bucket.refill(60, now=1.0)
    assert bucket.wait_s(60) == 0.0
    bucket.refill(60, now=1e6)
    assert bucket.left == 60


async def post_raw(app: Application, headers: list[tuple[bytes, bytes]]) -> int:
    """The status of one chat request made without a client library."""
    sent: list[Any] = []
    parts = iter([{"type": "http.request", "body": json.dumps(BODY).encode()}])

    async def receive() -> Any:
        try:
            return next(parts)
        except StopIteration:
            await asyncio.sleep(60)
            raise

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": headers,
    }
    await app(scope, receive, send)
    return int(sent[0]["status"])


def test_concurrent_requests_of_a_key_and_of_the_process(
    tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    script = Script(text="a b c", hold_after=1)
    engine = ScriptedEngine(tokenizer, script)
    app = guarded(engine, tokenizer, nano_card, store, max_requests=2)
    texts = [store.create(name, Permissions(max_concurrent=1))[1] for name in "ab"]
    one, two = ([(b"x-api-key", text.encode())] for text in texts)

    async def scenario() -> list[int]:
        first = asyncio.create_task(post_raw(app, one))
        while len(engine.requests) < 1:
            await asyncio.sleep(0.001)
        again = await post_raw(app, one)
        second = asyncio.create_task(post_raw(app, two))
        while len(engine.requests) < 2:
            await asyncio.sleep(0.001)
        full = await post_raw(app, two)
        script.release.set()
        return [again, full, await first, await second, await post_raw(app, one)]

    assert asyncio.run(scenario()) == [429, 503, 200, 200, 200]


def test_draining_refuses_in_the_protocols_shape(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    app = create_app(engine, tokenizer, nano_card)
    assert call(app, "GET", "/ready").json() == {"status": "ready"}
    app.drain()
    response = ask(app)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert "shutting down" in response.json()["error"]["message"]
    assert call(app, "POST", MESSAGES, json=QUESTION).json()["type"] == "error"
    assert call(app, "GET", "/ready").status_code == 503
    assert call(app, "GET", "/health").status_code == 200


def test_body_that_does_not_arrive_is_refused(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    app = create_app(engine, tokenizer, nano_card, body_timeout_s=0.05)

    async def slow() -> Any:
        yield b'{"model":'
        await asyncio.sleep(20)

    response = call(app, "POST", CHAT, content=slow())
    assert response.status_code == 408
    assert "0.05 s" in response.json()["error"]["message"]


# ---- ids --------------------------------------------------------------------------------------
def test_request_ids_come_back_and_strange_ones_are_replaced(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    app = create_app(engine, tokenizer, nano_card)
    given = ask(app, {"x-request-id": "job-7:3.1"})
    assert given.headers["x-request-id"] == given.headers["request-id"] == "job-7:3.1"
    made = {
        ask(app, {"x-request-id": bad} if bad else {}).headers["x-request-id"]
        for bad in ("", "a b", "x" * 200, '"}{"')
    }
    assert len(made) == 4
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", name) for name in made)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", True),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-what-comes", True),
        (f"00-{TRACE}-00f067aa0ba902b7-01-more", False),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", False),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", False),
        ("nonsense", False),
    ],
)
def test_traces_are_continued_with_a_span_of_our_own(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, sent: str, is_kept: bool
) -> None:
    app = create_app(engine, tokenizer, nano_card)
    got = ask(app, {"traceparent": sent}).headers.get("traceparent")
    if is_kept:
        assert got is not None
        version, trace, span, flags = got.split("-")
        assert (version, trace, flags) == ("00", TRACE, "01")
        assert re.fullmatch("[0-9a-f]{16}", span)
        assert span != "00f067aa0ba902b7"
    else:
        assert got is None


# ---- what is no request ------------------------------------------------------------------------
def test_start_up_messages_pass_and_websockets_are_closed(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    log = AccessLog(file := io.BytesIO())
    app = guarded(engine, tokenizer, nano_card, store, access_log=log, cors_origins=["*"])
    sent: list[Any] = []

    async def exchange(scope: dict[str, Any], *messages: str) -> None:
        kinds = iter(messages)

        async def receive() -> Any:
            return {"type": next(kinds)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await app(scope, receive, send)

    asyncio.run(exchange({"type": "lifespan"}, "lifespan.startup", "lifespan.shutdown"))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    websocket = {"type": "websocket", "path": CHAT, "headers": [], "query_string": b""}
    asyncio.run(exchange(websocket, "websocket.connect"))
    assert sent[2:] == ["websocket.close"]
    log.flush()
    assert file.getvalue() == b""


# ---- cross-origin -----------------------------------------------------------------------------
def test_other_origins_are_kept_out_unless_listed(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    closed = create_app(engine, tokenizer, nano_card)
    response = call(closed, "OPTIONS", CHAT, headers=preflight)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    opened = guarded(engine, tokenizer, nano_card, store, cors_origins=["https://app.example"])
    allowed = call(opened, "OPTIONS", CHAT, headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    answered = call(opened, "GET", "/health", headers={"Origin": "https://app.example"})
    readable = answered.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "x-rorqual-warning", "retry-after"} <= {*readable}
    stranger = call(
        opened, "OPTIONS", CHAT, headers={**preflight, "Origin": "https://evil.example"}
    )
    assert stranger.status_code == 400


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://evil.example", "127.0.0.1:8000", 403),
        ("http://evil.example:8000", "evil.example:8000", 403),  # a name made to mean 127.0.0.1
        ("null", "127.0.0.1:8000", 403),
        ("http://127.0.0.1:9", "127.0.0.1:8000", 403),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 200),
        ("http://[::1]:8000", "[::1]:8000", 200),
        ("http://localhost:8000", "localhost:8000", 200),
        ("https://app.example", "127.0.0.1:8000", 200),
        ("vscode-file://vscode-app", "127.0.0.1:8000", 200),
        ("http://[", "[", 403),
    ],
)
def test_without_keys_pages_of_other_origins_cannot_keep_the_model_busy(
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    origin: str,
    host: str,
    status: int,
) -> None:
    app = create_app(engine, tokenizer, nano_card, cors_origins=["https://app.example/"])
    answered = ask(app, {"Origin": origin, "Host": host, "Content-Type": "text/plain"})
    assert answered.status_code == status
    if status == 403:
        assert f"--cors-origin {origin} " in answered.json()["error"]["message"]
    assert len(engine.requests) == (status == 200)


# ---- logs and metrics -------------------------------------------------------------------------
def test_one_line_per_request_with_what_it_cost(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard, store: KeyStore
) -> None:
    file = io.BytesIO()
    log = AccessLog(file)
    app = guarded(engine, tokenizer, nano_card, store, access_log=log)
    _, text = store.create("ci", Permissions())
    trace = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "x-request-id": "job-7"}
    ask(app, {**bearer(text), **trace}, stream=True)
    ask(app, bearer(text), n=0)
    call(app, "GET", "/v1/secret-path?key=abc", headers=bearer(text))
    call(app, "GET", "/v1/models/nano-flash", headers=bearer(text))
    log.flush()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    answered, refused, nowhere, model = lines
    assert answered["ms"] >= answered["ttft_ms"] > 0
    assert answered["time"].endswith("+00:00")
    expected = {
        "request_id": "job-7",
        "trace_id": TRACE,
        "key": "ci",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "model": "nano-flash",
        "mode": "non-think",
        "prompt_tokens": len(engine.requests[0].prompt_ids),
        "cached_tokens": 1,
        "completion_tokens": 3,
        "finish": "stop",
    }
    assert {name: answered[name] for name in expected} == expected
    assert refused["status"] == 400
    assert "finish" not in refused
    assert (nowhere["route"], nowhere["status"]) == ("other", 404)
    assert model["route"] == "/v1/models/{name:path}"


def test_secrets_are_in_no_output(
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    store: KeyStore,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = io.BytesIO()
    log = AccessLog(file)
    app = guarded(engine, tokenizer, nano_card, store, access_log=log)
    key, text = store.create("ci", Permissions(requests_per_minute=2))
    outputs = []
    with caplog.at_level(logging.DEBUG):
        for headers in (bearer(text), {"x-api-key": text}, bearer(text), bearer(text + "0")):
            response = ask(app, headers)
            outputs += [response.text, str(response.headers)]
            outputs.append(call(app, "GET", f"/v1/models?api_key={text}", headers=headers).text)
        store.revoke("ci")
        outputs.append(ask(app, bearer(text)).text)
        outputs.append(call(app, "GET", "/metrics", headers=bearer(text)).text)
    log.flush()
    captured = capfd.readouterr()
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpx")]
    outputs += [captured.out, captured.err, *ours, file.getvalue().decode(), repr(key)]
    assert len(outputs) > 10
    secret = text.split("_")[2]
    assert not [output for output in outputs if secret in output]


def test_log_that_cannot_be_written_costs_nobody_an_answer(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    file = io.BytesIO()
    file.close()
    log = AccessLog(file)
    app = create_app(engine, tokenizer, nano_card, access_log=log)
    assert ask(app).status_code == 200
    log.flush()
    assert ask(app).status_code == 200


def samples(app: Application) -> dict[tuple[str, ...], float]:
    """Name and label values of every sample to its value, read as Prometheus reads it."""
    response = call(app, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_tokens_and_times(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    app = create_app(engine, tokenizer, nano_card)
    for _ in range(2):
        ask(app, stream=True)
    ask(app, n=0)
    ask(app, model="x")
    got = samples(app)
    assert got["rorqual_http_requests_total", "POST", CHAT, "200"] == 2
    assert got["rorqual_http_requests_total", "POST", CHAT, "400"] == 1
    assert got["rorqual_http_requests_total", "POST", CHAT, "404"] == 1
    num_prompt = len(engine.requests[0].prompt_ids)
    assert got["rorqual_tokens_total", "prompt_hit"] == 2
    assert got["rorqual_tokens_total", "prompt_miss"] == 2 * (num_prompt - 1)
    assert got["rorqual_tokens_total", "answer"] == 6
    assert got["rorqual_finished_total", "stop"] == 2
    assert got[("rorqual_time_to_first_token_seconds_count",)] == 2
    assert got[("rorqual_inter_token_seconds_count",)] == 4
    assert got["rorqual_inter_token_seconds_bucket", "+Inf"] == 4
    assert got[("rorqual_answer_seconds_count",)] == 2
    assert got[("rorqual_requests_running",)] == 0
    assert got[("rorqual_requests_waiting",)] == 0
    assert got[("rorqual_tool_parse_failures_total",)] == 0
    app.drain()
    assert samples(app)[("rorqual_draining",)] == 1


def test_strange_methods_and_paths_make_no_new_series(
    engine: ScriptedEngine, tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    app = create_app(engine, tokenizer, nano_card)
    for n in range(5):
        call(app, f"ODD{n}", f"/v1/path-{n}")
    counted = {key for key in samples(app) if key[0] == "rorqual_http_requests_total"}
    assert counted == {("rorqual_http_requests_total", "other", "other", "404")}
