"""Requests render to the prompts, ranges, sampling values and errors of the official package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import deepseek_recipe as recipe
import pytest
from golden_vectors import vectors

from rorqual.errors import RequestError
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer

CASES = vectors("golden_render")["cases"]
CONSTANTS = vectors("wire_constants")["constants"]
PARAMS = [(model, name) for model, cases in CASES.items() for name in cases]
GOOD = [(m, n) for m, n in PARAMS if "error" not in CASES[m][n]["result"]]
BAD = [(m, n) for m, n in PARAMS if "error" in CASES[m][n]["result"]]
PLACEHOLDER = re.compile(r"\{(DeepSeek-[^:{}]+):(\w+)\}")


def body_of(model: str, name: str) -> dict[str, Any]:
    return {"model": model, **CASES[model][name]["request"]}


def test_the_vectors_are_all_here() -> None:
    assert len(PARAMS) == 80
    assert len(GOOD) + len(BAD) == 80
    assert len(BAD) >= 14


@pytest.mark.parametrize(("model", "name"), GOOD)
def test_request_renders_as_the_official_package_does(
    model: str, name: str, renderer_of: Callable[[str], Renderer]
) -> None:
    expected = CASES[model][name]["result"]
    body = json.dumps(body_of(model, name), ensure_ascii=False).encode()
    request = renderer_of(model).render(body)

    assert len(request.prompt) == expected["prompt_chars"]
    assert hashlib.sha256(request.prompt.encode()).hexdigest() == expected["prompt_sha256"]
    assert [list(span) for span in request.special_ranges] == expected["special_ranges"]
    parts = re.split(r"\{DeepSeek-[^:{}]+:\w+\}", expected["prompt"])
    assert re.fullmatch(".*?".join(map(re.escape, parts)), request.prompt, re.DOTALL)

    assert request.sampling.temperature == expected["temperature"]
    assert request.sampling.top_p == expected["top_p"]
    requested = expected["max_tokens"]
    assert request.sampling.max_tokens == (
        requested or expected["resolved_max_tokens_for_10_of_1M"]
    )
    assert (request.constraint.kind if request.constraint else None) == expected["constraint"]
    parsing = request.conversation.parsing_options
    assert request.tools_declared == expected["parse_tool_calls"]
    assert parsing.starts_in_tool_calls == expected["starts_in_tool_calls"]
    assert str(parsing.thinking_initial_stage) == expected["initial_stage"]
    assert (request.mode == "non-think") == (not request.conversation.conversation.thinking_mode)


@pytest.mark.parametrize(("model", "name"), GOOD)
def test_constants_inside_prompts_have_the_official_digests(
    model: str, name: str, renderer_of: Callable[[str], Renderer]
) -> None:
    expected = CASES[model][name]["result"]
    prompt = renderer_of(model).render(body_of(model, name)).prompt
    at = 0
    rest = expected["prompt"]
    while match := PLACEHOLDER.search(rest):
        constant = CONSTANTS[match[1]][match[2]]
        at += match.start()
        text = prompt[at : at + constant["len"]]
        assert hashlib.sha256(text.encode()).hexdigest() == constant["sha256"]
        at += constant["len"]
        rest = rest[match.end() :]
    assert prompt[at:] == rest


@pytest.mark.parametrize("model", list(CONSTANTS))
def test_every_wire_constant_is_rendered(
    model: str, renderer_of: Callable[[str], Renderer]
) -> None:
    renderer = renderer_of(model)
    hi = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    tool = {"type": "function", "function": {"name": "f"}}

    def between(body: dict[str, Any], start: str, end: str) -> str:
        prompt = renderer.render(body).prompt
        return prompt[prompt.index(start) + len(start) : prompt.index(end)]

    found = {
        f"effort_prefix_{effort}": between(
            {**hi, "reasoning_effort": effort}, "<｜begin▁of▁sentence｜>", "<｜User｜>"
        )
        for effort in ("low", "high", "max")
    }
    block = between({**hi, "tools": [tool], "thinking": {"type": "disabled"}}, "\n\n", "<｜User｜>")
    schema = block[block.index('{"name": "f"') :].splitlines()[0]
    found["tools_block_head"], found["tools_block_tail"] = block.split(schema)
    for name, constant in CONSTANTS[model].items():
        assert len(found[name]) == constant["len"], name
        assert hashlib.sha256(found[name].encode()).hexdigest() == constant["sha256"], name


@pytest.mark.parametrize(("model", "name"), BAD)
def test_refused_request_has_the_official_message_and_names_the_field(
    model: str, name: str, renderer_of: Callable[[str], Renderer]
) -> None:
    expected = CASES[model][name]["result"]
    with pytest.raises(RequestError) as caught:
        renderer_of(model).render(body_of(model, name))
    error = caught.value
    assert error.status == 400
    assert error.param is not None
    assert str(error) in (expected["error"], f"{expected['error']} (at {error.param})")
    assert error.param.split("[")[0].split(".")[0] in {**body_of(model, name), "tools": 0}


@pytest.mark.parametrize(("model", "name"), GOOD)
def test_ids_equal_the_official_packages_own_prompt_encoding(
    model: str,
    name: str,
    renderer_of: Callable[[str], Renderer],
    golden_tokenizer: Tokenizer,
) -> None:
    request = renderer_of(model).render(body_of(model, name))
    kind = recipe.DeepseekV4Encoding if model == "DeepSeek-V4-Pro" else recipe.DeepseekV41Encoding
    official = kind().with_tokenizer(golden_tokenizer.stream_decoder)
    assert list(request.prompt_ids) == official.encode(request.conversation.conversation)
    assert golden_tokenizer.decode(request.prompt_ids) == request.prompt
