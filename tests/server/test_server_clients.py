"""Published clients against a real socket: the openai and anthropic SDKs, and openai-agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from starlette.applications import Starlette

from rorqual.engine.request import Request
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.testing.scripted_engine import Script, ScriptedEngine

MODEL = "nano-flash"
HI: Any = [{"role": "user", "content": "How warm is Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
ANSWER = "It is 21 degrees. 🐋"
Serve = Callable[[Any], tuple[ScriptedEngine, str]]


@pytest.fixture
def serve_script(
    tokenizer: Tokenizer, nano_card: ModelCard, on_socket: Callable[[Starlette], str]
) -> Serve:
    """Serves a script; gives the engine and the URL."""

    def start(script: Any) -> tuple[ScriptedEngine, str]:
        engine = ScriptedEngine(tokenizer, script)
        return engine, on_socket(create_app(engine, tokenizer, nano_card))

    return start


@pytest.fixture
def weather(serve_script: Serve, tokenizer: Tokenizer) -> tuple[ScriptedEngine, str]:
    """A model that looks the weather up, then says it; it thinks if it is asked to."""

    def script(request: Request) -> Script:
        prompt = tokenizer.decode(request.prompt_ids)
        thinks = prompt.endswith("<think>")
        text = ANSWER if "<tool_result>" in prompt else CALL
        return Script(text=f"Let me see.</think>{text}" if thinks else text, cached_tokens=3)

    return serve_script(script)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=20)


def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer, number: int) -> str:
    return tokenizer.decode(engine.requests[number].prompt_ids)


# ---- openai: Chat Completions -----------------------------------------------------------------
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


def test_openai_streamed_thinking_and_tool_round_trip(
    weather: tuple[ScriptedEngine, str], tokenizer: Tokenizer
) -> None:
    engine, url = weather
    messages = list(HI)
    asked: Any = {"model": MODEL, "tools": [CHAT_TOOL], "reasoning_effort": "high"}
    with openai_client(url) as client:
        with client.chat.completions.stream(messages=messages, **asked) as stream:
            first = stream.get_final_completion()
        choice = first.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        # As most agents do: the reasoning is not sent back.
        sent = {"id": call.id, "type": "function", "function": {"name": call.function.name}}
        sent["function"]["arguments"] = '{ "city":"Paris"}'
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [sent]},
            {"role": "tool", "tool_call_id": call.id, "content": "21"},
        ]
        second = client.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content == ANSWER
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 3
    assert second.usage.completion_tokens_details is not None
    assert second.usage.completion_tokens_details.reasoning_tokens
    first_prompt = engine.requests[0].prompt_ids
    assert engine.requests[1].prompt_ids[: len(first_prompt)] == first_prompt
    assert f"<think>Let me see.</think>{CALL}" in prompt_of(engine, tokenizer, 1)


def test_openai_async_clients_at_once(serve_script: Serve) -> None:
    _, url = serve_script(ANSWER)

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=20) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(ask()) == [ANSWER] * 8


class Weather(pydantic.BaseModel):
    city: str
    celsius: int


def test_openai_structured_output(serve_script: Serve) -> None:
    engine, url = serve_script('{"city": "Paris", "celsius": 21}')
    with openai_client(url) as client:
        chat = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Weather)
        assert chat.choices[0].message.parsed == Weather(city="Paris", celsius=21)
        response = client.responses.parse(model=MODEL, input=HI, text_format=Weather)
        assert response.output_parsed == Weather(city="Paris", celsius=21)
    assert all(request.constraint is not None for request in engine.requests)


def test_openai_forced_tool_choice_is_held_by_a_constraint(
    weather: tuple[ScriptedEngine, str],
) -> None:
    engine, url = weather
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with openai_client(url) as client:
        for choice in ("required", named):
            thinking: Any = {"reasoning_effort": "high", "tool_choice": choice}
            answer = client.chat.completions.create(
                model=MODEL, messages=HI, tools=[CHAT_TOOL], **thinking
            )
            assert answer.choices[0].message.tool_calls
            constraint: Any = engine.requests[-1].constraint
            assert constraint.answer is not None
            assert constraint.starts_reasoning
        named = {"type": "function", "function": {"name": "other"}}
        with pytest.raises(openai.BadRequestError, match="no function named 'other'"):
            client.chat.completions.create(
                model=MODEL, messages=HI, tools=[CHAT_TOOL], tool_choice=named
            )


def test_openai_prefix_continuation_logprobs_and_stop(serve_script: Serve) -> None:
    engine, url = serve_script(" is 21 degrees STOP and more")
    messages: Any = [*HI, {"role": "assistant", "content": "It", "prefix": True}]
    with openai_client(url) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, stop=["degrees STOP"], logprobs=True, top_logprobs=2
        )
    assert answer.choices[0].message.content == " is 21 "
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert {len(entry.top_logprobs) for entry in answer.choices[0].logprobs.content} == {2}
    assert engine.requests[0].sampling.logprobs == 2


# ---- openai: legacy completions ---------------------------------------------------------------
def test_openai_completions_echo_fill_and_stream(serve_script: Serve, tokenizer: Tokenizer) -> None:
    engine, url = serve_script("\n    return a + b\n")
    with openai_client(url) as client:
        asked: Any = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 50}
        whole = client.completions.create(**asked, echo=True, logprobs=1)
        assert whole.choices[0].text == "def add(a, b):\n    return a + b\n"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 0
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.text_offset is not None
        assert len(logprobs.tokens) == len(logprobs.text_offset) == whole.usage.completion_tokens
        filled = client.completions.create(**asked, suffix="\nprint(add(1, 2))")
        assert filled.choices[0].text == "\n    return a + b\n"
        with client.completions.create(**asked, stream=True, stop="b") as stream:
            chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "\n    return a + "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert prompt_of(engine, tokenizer, 0) == "<｜begin▁of▁sentence｜>def add(a, b):"
    assert prompt_of(engine, tokenizer, 1) == (
        "<｜begin▁of▁sentence｜><｜fim▁begin｜>def add(a, b):<｜fim▁hole｜>\nprint(add(1, 2))"
        "<｜fim▁end｜>"
    )


# ---- openai: Responses ------------------------------------------------------------------------
RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": PARAMETERS,
    "strict": False,
}


def test_openai_responses_tool_round_trip(
    weather: tuple[ScriptedEngine, str], tokenizer: Tokenizer
) -> None:
    engine, url = weather
    asked: Any = {"model": MODEL, "tools": [RESPONSES_TOOL], "reasoning": {"effort": "high"}}
    with openai_client(url) as client:
        first = client.responses.create(input=HI, store=False, **asked)
        assert [item.type for item in first.output] == ["reasoning", "function_call"]
        call: Any = first.output[1]
        # Without the reasoning item, as with store=False in many clients.
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
        history: Any = [*HI, call.model_dump(exclude_none=True), result]
        with client.responses.stream(input=history, **asked) as stream:
            kinds = [event.type for event in stream]
            second = stream.get_final_response()
    assert second.output_text == ANSWER
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens == 3
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert f"<think>Let me see.</think>{CALL}" in prompt_of(engine, tokenizer, 1)


def test_openai_responses_refuse_what_would_be_lost(serve_script: Serve) -> None:
    engine, url = serve_script(ANSWER)
    with openai_client(url) as client:
        for fields in (
            {"input": HI, "previous_response_id": "resp_1"},
            {"input": HI, "background": True},
            {"input": HI, "conversation": "conv_1"},
            {"input": [*HI, {"type": "item_reference", "id": "rs_1"}]},
        ):
            with pytest.raises(openai.BadRequestError, match="not supported") as refused:
                client.responses.create(model=MODEL, **fields)  # type: ignore[call-overload]
            assert refused.value.param
    assert engine.requests == []


def test_openai_responses_stream_that_fails_says_so(serve_script: Serve) -> None:
    _, url = serve_script(Script(text="half", error="broken"))
    with openai_client(url) as client:
        stream = client.responses.create(model=MODEL, input="Hi", stream=True)
        events: Any = list(stream)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.error.code == "engine_error"
    assert [event.sequence_number for event in events] == list(range(len(events)))


# ---- anthropic --------------------------------------------------------------------------------
TOOL: Any = {"name": "get_weather", "input_schema": PARAMETERS}
THINK: Any = {"type": "enabled", "budget_tokens": 1024}


def test_anthropic_tool_round_trip_with_thinking_blocks(
    weather: tuple[ScriptedEngine, str], tokenizer: Tokenizer
) -> None:
    engine, url = weather
    asked: Any = {"model": MODEL, "max_tokens": 4000, "tools": [TOOL], "thinking": THINK}
    with anthropic_client(url) as client:
        first = client.messages.create(messages=HI, **asked)
        assert [block.type for block in first.content] == ["thinking", "tool_use"]
        assert first.stop_reason == "tool_use"
        assert first.usage.cache_read_input_tokens == 3
        thought, call = first.content
        assert thought.type == "thinking"
        assert thought.signature
        assert call.type == "tool_use"
        assert call.input == {"city": "Paris"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "21"}
        messages: Any = [
            *HI,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        with client.messages.stream(messages=messages, **asked) as stream:
            text = "".join(stream.text_stream)
            second = stream.get_final_message()
    assert text == ANSWER
    assert [block.type for block in second.content] == ["thinking", "text"]
    assert second.stop_reason == "end_turn"
    assert f"<think>Let me see.</think>{CALL}" in prompt_of(engine, tokenizer, 1)
    assert engine.requests[0].constraint is not None


def test_anthropic_model_names_count_tokens_and_catalogue(
    weather: tuple[ScriptedEngine, str],
) -> None:
    engine, url = weather
    with anthropic_client(f"{url}/anthropic") as client:
        counted = client.messages.count_tokens(model=MODEL, messages=HI, tools=[TOOL])
        assert engine.requests == []
        named = "claude-opus-4-6"
        answer = client.messages.create(model=named, messages=HI, tools=[TOOL], max_tokens=99)
        assert answer.model == named
        assert counted.input_tokens == len(engine.requests[0].prompt_ids)
        assert counted.input_tokens == 3 + answer.usage.input_tokens
        assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(model="gpt-5", messages=HI, max_tokens=9)
        assert unknown.value.body == {
            "type": "error",
            "error": {"type": "not_found_error", "message": unknown.value.body["error"]["message"]},  # type: ignore[index]
        }


def test_anthropic_structured_output_and_forced_tool(serve_script: Serve) -> None:
    engine, url = serve_script('{"city": "Paris", "celsius": 21}')
    with anthropic_client(url) as client:
        parsed = client.messages.parse(
            model=MODEL, messages=HI, max_tokens=99, output_format=Weather
        )
        assert parsed.parsed_output == Weather(city="Paris", celsius=21)
        constraint: Any = engine.requests[-1].constraint
        assert constraint.answer is not None
        client.messages.create(
            model=MODEL,
            messages=HI,
            max_tokens=2000,
            tools=[TOOL],
            tool_choice={"type": "any"},
            thinking=THINK,
        )
        constraint = engine.requests[-1].constraint
        assert constraint.answer is not None
        assert constraint.starts_reasoning
        assert constraint.max_thinking_tokens == 1024


def test_anthropic_streamed_failure_is_an_error_event(serve_script: Serve) -> None:
    _, url = serve_script(Script(text="half", error="broken"))
    asked: Any = {"model": MODEL, "messages": HI, "max_tokens": 99}
    with (
        anthropic_client(url) as client,
        pytest.raises(anthropic.APIStatusError, match="the model failed"),
        client.messages.stream(**asked) as stream,
    ):
        list(stream.text_stream)


def test_anthropic_async(serve_script: Serve) -> None:
    _, url = serve_script(ANSWER)

    async def ask() -> Any:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="any", timeout=20) as client:
            return await client.messages.create(model=MODEL, messages=HI, max_tokens=99)

    assert asyncio.run(ask()).content[0].text == ANSWER


def test_claude_codes_system_blocks_and_reminders(
    serve_script: Serve, tokenizer: Tokenizer
) -> None:
    engine, url = serve_script(ANSWER)
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.7; cch=1f;"},
        {"type": "text", "text": "You are Claude Code.", **cached},
    ]
    messages: Any = [
        *HI,
        {"role": "system", "content": "The date is today."},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "zz"},
                {"type": "text", "text": "Wait.", **cached},
            ],
        },
        {"role": "user", "content": [{"type": "text", "text": "Well?", **cached}]},
    ]
    extra = {"context_management": {"edits": []}, "metadata": {"user_id": "u"}}
    tools: Any = [{**TOOL, "type": "custom", "defer_loading": True, **cached}]
    with anthropic_client(url) as client:
        client.messages.create(
            model="claude-haiku-4-5",
            messages=messages,
            system=system,
            tools=tools,
            max_tokens=32_000,
            extra_body=extra,
        )
    prompt = prompt_of(engine, tokenizer, 0)
    assert "billing" not in prompt
    assert "You are Claude Code." in prompt
    assert "<system-reminder>\nThe date is today.\n</system-reminder>" in prompt
    assert "ephemeral" not in prompt
    assert len(engine.requests[0].prompt_ids) + engine.requests[0].sampling.max_tokens == 8192


# ---- openai-agents ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents_tool_loop(weather: tuple[ScriptedEngine, str], kind: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    engine, url = weather
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "21"

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=20) as client:
            chat, responses = agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel
            model = (chat if kind == "chat" else responses)(MODEL, client)
            agent = agents.Agent(name="guide", tools=[get_weather], model=model)
            result = await agents.Runner.run(agent, "How warm is Paris?")
            return str(result.final_output)

    assert asyncio.run(run()) == ANSWER
    assert asked == ["Paris"]
    assert len(engine.requests) == 2
