"""Chat completions in process: answers, streams, the client leaving, the engine failing."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import pytest
from asgi_call import BODY, CHAT, NANO, call, post, sse_data, visit

from rorqual.engine.request import Request
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.testing.scripted_engine import Script, ScriptedEngine

THINK = {"thinking": {"type": "enabled"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = (
    'I add.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n'
    '<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_whole_answer(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="why</think>It is 🐋.", cached_tokens=2))
    response = post(create_app(engine, tokenizer, nano_card), **THINK)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "nano-flash"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    message = {"role": "assistant", "content": "It is 🐋.", "reasoning_content": "why"}
    assert choice["message"] == message
    assert choice["finish_reason"] == "stop"
    (request,) = engine.requests
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(request.prompt_ids)
    assert usage["prompt_cache_hit_tokens"] == 2
    assert usage["prompt_cache_miss_tokens"] == len(request.prompt_ids) - 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("tokens_per_output", [1, 4, 1000])
def test_streamed_answer_is_the_whole_answer(
    tokenizer: Tokenizer, nano_card: ModelCard, tokens_per_output: int
) -> None:
    script = Script(text="why</think>It is 🐋.", tokens_per_output=tokens_per_output)
    app = create_app(ScriptedEngine(tokenizer, script), tokenizer, nano_card)
    response = post(app, stream=True, **THINK)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = sse_data(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is 🐋."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "why"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_tool_call(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, CALL), tokenizer, nano_card)
    choice = post(app, tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I add."
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "add", "arguments": '{"a": 2}'}
    undeclared = post(app).json()["choices"][0]
    assert "tool_calls" not in undeclared["message"]


def test_engine_gets_the_rendered_prompt_and_sampling(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, "ok")
    app = create_app(engine, tokenizer, nano_card)
    fields = {"temperature": 0.5, "top_k": 3, "seed": 9, "max_tokens": 17, "logprobs": True}
    post(app, **fields)
    post(app)
    asked, silent = engine.requests
    rendered = Renderer(nano_card, tokenizer).render(BODY)
    assert asked.prompt_ids == silent.prompt_ids == rendered.prompt_ids
    assert asked.sampling.temperature == 0.5
    assert (asked.sampling.top_k, asked.sampling.seed, asked.sampling.max_tokens) == (3, 9, 17)
    assert asked.sampling.logprobs == 0
    assert asked.sampling.stop_token_ids == (tokenizer.eos_id,)
    assert silent.sampling.temperature == 0.0
    assert silent.sampling.logprobs is None
    assert asked.request_id != silent.request_id


def test_length_limit(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, "one two three four"), tokenizer, nano_card)
    body = post(app, max_tokens=2).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_usage_is_the_engines_count_wherever_the_answer_is_cut(
    tokenizer: Tokenizer, nano_card: ModelCard, stream: bool
) -> None:
    text = "why 🐋</think>It is 🐋."
    app = create_app(ScriptedEngine(tokenizer, text), tokenizer, nano_card)
    total = len(tokenizer.encode_plain("why 🐋")) + 1 + len(tokenizer.encode_plain("It is 🐋."))
    for limit in range(1, total + 1):
        response = post(app, max_tokens=limit, stream=stream, **THINK)
        answer = sse_data(response.text)[-2] if stream else response.json()
        assert answer["usage"]["completion_tokens"] == limit
        assert answer["choices"][0]["finish_reason"] == "length"


def test_logprobs_in_openais_shape(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, "ab 🐋"), tokenizer, nano_card)
    content = post(app, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "ab 🐋".encode()
    assert {len(entry["top_logprobs"]) for entry in content} == {2}
    assert all(entry["logprob"] == pytest.approx(-0.693147) for entry in content)
    assert post(app).json()["choices"][0]["logprobs"] is None


def test_stop_string_ends_the_generation_in_the_engine(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    held = Script(text="one two STOP three four five", hold_after=8)
    for stream in (False, True):
        engine = ScriptedEngine(tokenizer, held)
        response = post(create_app(engine, tokenizer, nano_card), stop=["STOP"], stream=stream)
        text = "".join(map(str, sse_data(response.text))) if stream else response.text
        assert "STOP" not in text
        assert "three" not in text
        assert engine.handles[0].cancelled.is_set()
        assert engine.wait_idle(10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_client_that_leaves_cancels_its_generation(
    tokenizer: Tokenizer, nano_card: ModelCard, stream: bool, after: int
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a b c d e f g h", hold_after=after))
    app = create_app(engine, tokenizer, nano_card)

    def enough(seen: Any) -> bool:
        return bool(engine.handles) and (not stream or seen.text.count("data:") >= after)

    seen = asyncio.run(visit(app, {**BODY, "stream": stream}, leave_when=enough))
    assert engine.handles[0].cancelled.is_set()
    assert engine.wait_idle(10)
    assert "DONE" not in seen.text
    assert seen.status == (200 if stream else None)


def test_finished_generation_is_not_cancelled(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    engine = ScriptedEngine(tokenizer, "done")
    app = create_app(engine, tokenizer, nano_card)
    for stream in (False, True):
        post(app, stream=stream)
    assert [handle.cancelled.is_set() for handle in engine.handles] == [False, False]


def test_many_at_once_do_not_mix(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    barrier = threading.Barrier(12, timeout=20)

    def echo(request: Request) -> Script:
        barrier.wait()
        prompt = tokenizer.decode(request.prompt_ids)
        return Script(text=f"you said {prompt.split('<｜User｜>')[1].split('<')[0]}!")

    app = create_app(ScriptedEngine(tokenizer, echo), tokenizer, nano_card)

    async def ask(number: int) -> str:
        messages = [{"role": "user", "content": f"number {number}"}]
        body = {**BODY, "messages": messages, "stream": True}
        seen = await visit(app, body, leave_when=lambda _: False)
        deltas = [d["choices"][0]["delta"] for d in sse_data(seen.text)[:-1]]
        return "".join(delta["content"] for delta in deltas)

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(number) for number in range(12)))

    assert asyncio.run(ask_all()) == [f"you said number {n}!" for n in range(12)]


def test_silent_stream_gets_comments(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    script = Script(text="late", hold_after=0)
    app = create_app(ScriptedEngine(tokenizer, script), tokenizer, nano_card, keepalive_s=0.01)

    def patient(seen: Any) -> bool:
        if seen.text.count(": keep-alive\n\n") >= 2:
            script.release.set()
        return False

    seen = asyncio.run(visit(app, {**BODY, "stream": True}, leave_when=patient))
    assert seen.text.startswith(": keep-alive\n\n")
    *chunks, done = sse_data(seen.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "late"


# ---- the engine's failures --------------------------------------------------------------------
FAILED = r"the model failed on this request \(chatcmpl-\w+\)"


def test_engine_failure_is_reported_and_its_details_logged(
    tokenizer: Tokenizer, nano_card: ModelCard, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="half an", error="the disk is on fire"))
    app = create_app(engine, tokenizer, nano_card)
    whole = post(app)
    assert whole.status_code == 500
    assert re.fullmatch(FAILED, whole.json()["error"]["message"])
    assert "the disk is on fire" in caplog.text
    assert whole.json()["error"]["type"] == "server_error"
    events = sse_data(post(app, stream=True).text)
    assert re.fullmatch(FAILED, events[-1]["error"]["message"])
    assert "[DONE]" not in events
    text = "".join(e["choices"][0]["delta"]["content"] for e in events[:-1])
    assert "half an".startswith(text)


@pytest.mark.parametrize("stream", [False, True])
def test_engine_that_shuts_down_ends_the_answer_with_an_error(
    tokenizer: Tokenizer, nano_card: ModelCard, stream: bool
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a b c d", hold_after=2))
    app = create_app(engine, tokenizer, nano_card)

    def close_once(seen: Any) -> bool:
        if engine.handles:
            engine.close()
        return False

    seen = asyncio.run(visit(app, {**BODY, "stream": stream}, leave_when=close_once))
    last = sse_data(seen.text)[-1] if stream else json.loads(seen.text)
    assert last["error"]["code"] == "engine_closed"
    assert seen.status == (200 if stream else 503)


def test_overloaded_and_closed_engines(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    engine = ScriptedEngine(tokenizer, "ok", max_running=0)
    app = create_app(engine, tokenizer, nano_card)
    response = post(app, stream=True)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "engine_overloaded"
    assert post(app, messages=5).status_code == 429, "nothing is rendered for a full queue"
    engine.close()
    response = post(app)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_closed"


def test_client_that_stops_reading_loses_its_generation(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a b c d", hold_after=2))
    app = create_app(engine, tokenizer, nano_card, send_timeout_s=0.05, keepalive_s=0.02)
    parts = [{"type": "http.request", "body": json.dumps({**BODY, "stream": True}).encode()}]

    async def scenario() -> None:
        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": CHAT,
            "headers": [],
            "query_string": b"",
            "scheme": "http",
            "server": ("127.0.0.1", 2),
        }
        async with asyncio.timeout(20):
            await app(scope, receive, send)

    asyncio.run(scenario())
    assert engine.handles[0].cancelled.is_set()


def test_health_of_a_closed_engine(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    engine = ScriptedEngine(tokenizer, "ok")
    app = create_app(engine, tokenizer, nano_card)
    assert call(app, "GET", "/health").json()["status"] == "ok"
    engine.close()
    response = call(app, "GET", "/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_closed"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_context_is_the_lesser_of_card_and_engine(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = ScriptedEngine(tokenizer, "ok", max_context_tokens=100)
    app = create_app(engine, tokenizer, nano_card)
    response = post(app, messages=[{"role": "user", "content": "x " * 100}])
    assert response.status_code == 400
    assert "maximum context length is 100 tokens" in response.json()["error"]["message"]
    assert post(app).status_code == 200
    prompt = len(engine.requests[0].prompt_ids)
    assert engine.requests[0].sampling.max_tokens == 100 - prompt
    assert call(app, "GET", "/v1/models/nano-flash").json()["context_length"] == 100


def test_deepseeks_own_base_url_works_too(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card)
    response = call(app, "POST", CHAT.removeprefix("/v1"), json=BODY)
    assert response.json()["choices"][0]["message"]["content"] == "ok"


def test_the_first_constrained_request_finds_the_vocabularys_tables_made(
    nano_card: ModelCard,
) -> None:
    tokenizer = Tokenizer.from_dir(NANO)
    assert "grammars" not in vars(tokenizer)
    create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card)
    assert "grammars" in vars(tokenizer)
