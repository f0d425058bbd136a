"""Every dialect of asking for reasoning ends in one mode, one budget, or a clear contradiction."""

from __future__ import annotations

from typing import Any

import pytest
from protocol_samples import BODY, HI, OFF, renderer_with

from rorqual.errors import RequestError, UnknownModelError
from rorqual.protocol.dialects import Protocol
from rorqual.protocol.modes import Generation, Mode
from rorqual.protocol.render import RenderedRequest

BODIES: dict[Protocol, dict[str, Any]] = {
    "chat": BODY,
    "messages": BODY,
    "responses": {"model": "m", "input": HI},
}
PROTOCOLS = list(BODIES)


def render(protocol: Protocol, fields: dict[str, Any], **card: Any) -> RenderedRequest:
    return renderer_with(**card).render({**BODIES[protocol], **fields}, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("generation", ["preview", "ga"])
@pytest.mark.parametrize(
    ("fields", "modes"),
    [
        ({}, ("non-think", "non-think")),
        ({"thinking": {"type": "disabled"}}, ("non-think", "non-think")),
        ({"thinking": {"type": "enabled"}}, ("think", "think")),
        ({"thinking": {"type": "adaptive"}}, ("think", "think")),
        ({"reasoning_effort": "none"}, ("non-think", "non-think")),
        ({"reasoning_effort": "xhigh"}, ("think-max", "think")),
        ({"reasoning": {"effort": "max"}}, ("think-max", "think-max")),
        ({"output_config": {"effort": "high"}}, ("think", "think")),
        ({"reasoning": {"max_tokens": 50}}, ("think", "think")),
        ({"model": "m-think"}, ("think", "think")),
        ({"model": "m:think-max"}, ("think-max", "think-max")),
        ({"model": "m-non-think"}, ("non-think", "non-think")),
        ({"model": "m-think", "reasoning_effort": "low"}, ("think", "think")),
    ],
)
def test_dialect_means_a_mode(
    protocol: Protocol, generation: Generation, fields: dict[str, Any], modes: tuple[Mode, Mode]
) -> None:
    request = render(protocol, fields, generation=generation, default_mode="non-think")
    assert request.mode == modes[generation == "ga"]
    assert request.prompt.endswith("</think>") == (request.mode == "non-think")
    assert request.model == fields.get("model", "m")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("fields", "param", "other"),
    [
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking.type", "effort"),
        ({"model": "m-think", "thinking": {"type": "disabled"}}, "model", "thinking.type"),
        ({"model": "m-think", "reasoning_effort": "max"}, "reasoning_effort", "model"),
        (
            {"reasoning_effort": "low", "reasoning": {"effort": "max"}},
            "reasoning_effort",
            "reasoning.effort",
        ),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 5}},
            "thinking.budget_tokens",
            "thinking.type",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}, "reasoning": {"max_tokens": 6}},
            "thinking.budget_tokens",
            "reasoning.max_tokens",
        ),
    ],
)
def test_contradiction_names_both_fields(
    protocol: Protocol, fields: dict[str, Any], param: str, other: str
) -> None:
    with pytest.raises(RequestError) as caught:
        render(protocol, fields)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert other in str(caught.value)


def test_effort_beside_disabled_thinking_is_idle_in_messages_only() -> None:
    fields: dict[str, Any] = {**OFF, "output_config": {"effort": "high"}}
    assert render("messages", fields).mode == "non-think"
    with pytest.raises(RequestError, match=r"output_config\.effort asks for thinking"):
        render("chat", fields)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": 5}, "thinking"),
        ({"thinking": {"type": "loud"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": "much"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "reserve_tokens": True}}, "thinking.reserve_tokens"),
        ({"reasoning": {"effort": "loud"}}, "reasoning.effort"),
        ({"reasoning": []}, "reasoning"),
        ({"output_config": {"effort": 3}}, "output_config.effort"),
    ],
)
def test_malformed_field_is_named(protocol: Protocol, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(protocol, fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("thinking", "budget"),
    [
        ({}, 299),  # a quarter of 400 is the answer's, one token closes the reasoning
        ({"budget_tokens": 50}, 50),
        ({"budget_tokens": 399}, 299),
        ({"reserve_tokens": 10}, 389),
        ({"reserve_tokens": 0}, None),
        ({"reserve_tokens": 0, "budget_tokens": 500}, 399),
        ({"reserve_tokens": 9999}, 0),
    ],
)
def test_reasoning_leaves_room_for_the_answer(thinking: dict[str, int], budget: int | None) -> None:
    fields = {"max_tokens": 400, "thinking": {"type": "enabled", **thinking}}
    assert render("chat", fields).thinking_budget == budget


def test_the_default_reserve_is_bounded_and_idle_without_reasoning() -> None:
    big = {"context_length": 1_000_000}
    thinks = {"thinking": {"type": "enabled"}, "max_tokens": 100_000}
    assert render("chat", thinks, **big).thinking_budget == 100_000 - 8192 - 1
    assert render("chat", {**OFF, "max_tokens": 100}).thinking_budget is None
    begun = [*HI, {"role": "assistant", "content": "It is", "prefix": True}]
    assert render("chat", {**thinks, "messages": begun}, **big).thinking_budget is None
    half = [*HI, {"role": "assistant", "content": "", "reasoning_content": "So", "prefix": True}]
    assert render("chat", {**thinks, "messages": half}, **big).thinking_budget is not None


def test_think_max_warns_below_the_context_it_was_made_for() -> None:
    fields = {"reasoning_effort": "max", "max_tokens": 5}
    (warning,) = render("chat", fields, context_length=393_216).warnings
    assert "393216" in warning
    assert render("chat", fields, context_length=400_000).warnings == ()
    assert render("chat", {"reasoning_effort": "high"}).warnings == ()


def test_claude_names_mean_the_served_model_in_messages_only() -> None:
    assert render("messages", {"model": "claude-sonnet-4-5"}).model == "claude-sonnet-4-5"
    for protocol in ("chat", "responses"):
        with pytest.raises(UnknownModelError):
            render(protocol, {"model": "claude-sonnet-4-5"})  # type: ignore[arg-type]
