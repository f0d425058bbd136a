"""Requests are validated when they are made, and errors name the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rorqual.engine.request import Request, SamplingParams
from rorqual.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0),
        ("seed", "x"),
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop_token_ids", (-1,)),
    ],
)
def test_out_of_range_sampling_value_is_refused_by_name(field: str, value: Any) -> None:
    values: dict[str, Any] = {"max_tokens": 1, field: value}
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert caught.value.param == field
    assert field in str(caught.value)


def test_sampling_params_are_frozen_and_replace_validates() -> None:
    params = SamplingParams(max_tokens=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 5  # type: ignore[misc]
    assert params.replace(top_k=3).top_k == 3
    with pytest.raises(RequestError):
        params.replace(top_k=-3)


@pytest.mark.parametrize("prompt", [[], [1, -1], [1, 2.0], [True], ["a"]])
def test_prompt_that_is_not_token_ids_is_refused(prompt: list[Any]) -> None:
    with pytest.raises(RequestError) as caught:
        Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=1), request_id="r")
    assert caught.value.param == "prompt_ids"


def test_a_request_keeps_its_own_copy_of_the_prompt() -> None:
    prompt = [1, 2]
    request = Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=1), request_id="r")
    prompt.append(3)
    assert request.prompt_ids == (1, 2)
