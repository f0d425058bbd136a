"""The scripted engine behaves as the real one does towards its callers."""

from __future__ import annotations

import pytest

from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.errors import EngineClosedError, EngineOverloadedError
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.testing.scripted_engine import Script, ScriptedEngine


def request(max_tokens: int = 100) -> Request:
    return Request(
        prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=max_tokens), request_id="r"
    )


def text_of(tokenizer: Tokenizer, outputs: list[TokenOutput]) -> str:
    return tokenizer.decode([token for output in outputs for token in output.token_ids])


def test_handle_gives_the_script_and_one_last_output(tokenizer: Tokenizer) -> None:
    script = Script(text="a</think>b", tokens_per_output=2, cached_tokens=1)
    with ScriptedEngine(tokenizer, script) as engine:
        outputs = list(engine.submit(request()))
    assert text_of(tokenizer, outputs) == "a</think>b"
    assert tokenizer.think_end_id in outputs[0].token_ids
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason == "stop"
    usage = outputs[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (2, 1, 3)


def test_length_error_and_cancellation(tokenizer: Tokenizer) -> None:
    with ScriptedEngine(tokenizer, "a b c d") as engine:
        cut = list(engine.submit(request(max_tokens=2)))
        assert text_of(tokenizer, cut) == "a b"
        assert cut[-1].finish_reason == "length"
    with ScriptedEngine(tokenizer, Script(text="a", error="broken")) as engine:
        assert list(engine.submit(request()))[-1].error == "broken"
    with ScriptedEngine(tokenizer, Script(text="a b c", hold_after=1)) as engine:
        handle = engine.submit(request())
        handle.cancel()
        assert list(handle)[-1].finish_reason == "cancelled"
        assert engine.wait_idle(10)


def test_refusals(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, Script(text="a", hold_after=0), max_running=1)
    engine.submit(request())
    assert engine.stats().num_running == 1
    with pytest.raises(EngineOverloadedError):
        engine.submit(request())
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(request())
    assert engine.wait_idle(10)
