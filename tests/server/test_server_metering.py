"""Every answer is logged, counted and charged once, whichever way it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from asgi_call import BODY, CHAT, call, post, sse_data, visit
from prometheus_client.parser import text_string_to_metric_families

from rorqual.engine.request import Request, TokenOutput, Usage
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.access_log import AccessLog
from rorqual.server.app import Application, create_app
from rorqual.server.keys import KeyRing, KeyStore, Permissions
from rorqual.server.record import RequestRecord
from rorqual.testing.scripted_engine import Script, ScriptedEngine, ScriptedHandle

TEXT = "It is 🐋, one STOP two three four"
THINK = {"thinking": {"type": "enabled"}}
CHAT_STOP = {**BODY, "stop": ["STOP"]}
MESSAGES_STOP = {**BODY, "max_tokens": 60, "stop_sequences": ["STOP"]}
TEXT_STOP = {"model": "nano-flash", "prompt": "Hi", "max_tokens": 60, "stop": ["STOP"]}


class CountingEngine(ScriptedEngine):
    """Knows how many tokens it has handed out."""

    num_tokens = 0

    def submit(self, request: Request) -> ScriptedHandle:
        deliver = request.on_output
        assert deliver is not None

        def counted(output: TokenOutput) -> None:
            deliver(output)
            self.num_tokens += len(output.token_ids)

        return super().submit(dataclasses.replace(request, on_output=counted))


class Times:
    """Nobody's."""

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        assert seconds >= 0
        assert num_tokens


def counted(app: Application) -> dict[tuple[str, ...], float]:
    """Every sample that is not 0, by name and label values."""
    text = call(app, "GET", "/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.value
    }


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, CHAT_STOP),
        (CHAT, {**CHAT_STOP, "stream": True}),
        (CHAT, {**CHAT_STOP, **THINK}),
        ("/v1/messages", MESSAGES_STOP),
        ("/v1/completions", TEXT_STOP),
    ],
    ids=["chat", "stream", "think", "messages", "completions"],
)
def test_answer_cut_at_a_stop_string_counts_as_the_client_is_told(
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    tokens_per_output: int,
    path: str,
    body: dict[str, Any],
) -> None:
    text = f"why</think>{TEXT}" if "thinking" in body else TEXT
    script = Script(text=text, cached_tokens=1, tokens_per_output=tokens_per_output)
    log = AccessLog(file := io.BytesIO())
    engine = ScriptedEngine(tokenizer, script)
    app = create_app(engine, tokenizer, nano_card, access_log=log)
    response = call(app, "POST", path, json=body)
    assert "two" not in response.text
    usage = (sse_data(response.text)[-2] if "stream" in body else response.json())["usage"]
    told = usage.get("completion_tokens", usage.get("output_tokens"))
    log.flush()
    line = json.loads(file.getvalue().splitlines()[0])
    num_prompt = len(engine.requests[0].prompt_ids)
    assert line["finish"] == "stop"
    assert line["ttft_ms"] > 0
    assert (line["prompt_tokens"], line["cached_tokens"]) == (num_prompt, 1)
    assert line["completion_tokens"] == told > 0
    got = counted(app)
    assert got["rorqual_finished_total", "stop"] == 1
    assert got["rorqual_tokens_total", "prompt_miss"] == num_prompt - 1
    reasoning = got.get(("rorqual_tokens_total", "reasoning"), 0)
    assert bool(reasoning) == ("thinking" in body)
    assert got["rorqual_tokens_total", "answer"] + reasoning == told
    assert got[("rorqual_answer_seconds_count",)] == 1


def test_answer_cut_at_a_stop_string_is_charged_to_its_key(
    tokenizer: Tokenizer, nano_card: ModelCard, tmp_path: Path
) -> None:
    with KeyStore(tmp_path / "keys") as store:
        _, text = store.create("ci", Permissions(tokens_per_minute=1))
        engine = ScriptedEngine(tokenizer, Script(text=TEXT, hold_after=12))
        app = create_app(engine, tokenizer, nano_card, keys=KeyRing(store))
        headers = {"x-api-key": text}
        answers = [call(app, "POST", CHAT, json=CHAT_STOP, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_answer_its_client_left_counts_as_far_as_it_came(
    tokenizer: Tokenizer, nano_card: ModelCard, stream: bool, num_tokens: int
) -> None:
    script = Script(text="why not</think>a b c d e f g", hold_after=num_tokens, cached_tokens=1)
    engine = CountingEngine(tokenizer, script)
    log = AccessLog(file := io.BytesIO())
    app = create_app(engine, tokenizer, nano_card, access_log=log)

    def enough(seen: Any) -> bool:
        is_begun = not stream or seen.status is not None
        return is_begun and bool(engine.handles) and engine.num_tokens == num_tokens

    asyncio.run(visit(app, {**BODY, **THINK, "stream": stream}, leave_when=enough))
    assert engine.wait_idle(10)
    log.flush()
    line = json.loads(file.getvalue())
    num_prompt = len(engine.requests[0].prompt_ids)
    assert line["status"] == (200 if stream else 499)
    assert line["finish"] == "cancelled"
    assert (line["prompt_tokens"], line["completion_tokens"]) == (num_prompt, num_tokens)
    assert ("ttft_ms" in line) == (num_tokens > 0)
    got = counted(app)
    assert got["rorqual_finished_total", "cancelled"] == 1
    classes = ("prompt_hit", "prompt_miss", "reasoning", "answer")
    total = sum(got.get(("rorqual_tokens_total", name), 0) for name in classes)
    assert total == num_prompt + num_tokens
    assert got[("rorqual_answer_seconds_count",)] == 1


def test_failed_answer_counts_what_was_generated(
    tokenizer: Tokenizer, nano_card: ModelCard
) -> None:
    engine = CountingEngine(tokenizer, Script(text="a b c", error="the disk is on fire"))
    app = create_app(engine, tokenizer, nano_card)
    assert post(app).status_code == 500
    got = counted(app)
    assert got["rorqual_finished_total", "error"] == 1
    assert got["rorqual_tokens_total", "answer"] == engine.num_tokens > 0


def test_what_the_engine_writes_after_the_end_is_nobodys() -> None:
    charged: list[int] = []
    record = RequestRecord("r", None, Times())
    record.charge = charged.append
    output = record.watch(lambda _: None, 10)
    output(
        TokenOutput(
            token_ids=(1, 2), usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=2)
        )
    )
    record.settle(reasoning_tokens=1, stopped_after=None)
    output(
        TokenOutput(
            token_ids=(3,),
            finish_reason="cancelled",
            usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3),
        )
    )
    record.settle(reasoning_tokens=3, stopped_after=3)
    assert charged == [12]
    assert (record.finish, record.completion_tokens) == ("cancelled", 2)
    assert (record.prompt_tokens, record.cached_tokens, record.reasoning_tokens) == (10, 4, 1)
