"""``/openapi.json`` describes the server that serves it: bodies made from it, statuses it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgi_call import NANO, call
from hypothesis import HealthCheck, Phase, given, seed, settings
from starlette.applications import Starlette

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.openapi import openapi_document
from rorqual.testing.scripted_engine import Script, ScriptedEngine

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
DOCUMENT = openapi_document(ModelCard.from_dir(NANO))
SCHEMA: Any = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS: dict[str, Any] = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


def bounded(test: Callable[[Any], None]) -> None:
    """Run ``test`` on 30 cases, the same each time."""
    phases = [Phase.explicit, Phase.generate]
    checked = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    limits = settings(
        max_examples=30, deadline=None, database=None, phases=phases, suppress_health_check=checked
    )
    limits(seed(1)(test))()


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label, operation in OPERATIONS.items()
        for mode in ("positive", "negative")
        # Without a body or a parameter nothing can be wrong.
        if mode == "positive" or len(operation.body) or len(operation.path_parameters)
    ],
)
def test_endpoints_answer_as_documented(
    label: str,
    mode: str,
    tokenizer: Tokenizer,
    nano_card: ModelCard,
    on_socket: Callable[[Starlette], str],
) -> None:
    operation = OPERATIONS[label]
    generation = schemathesis.GenerationMode(mode)
    engine = ScriptedEngine(tokenizer, Script(text="ok", tokens_per_output=8))
    url = on_socket(create_app(engine, tokenizer, nano_card))
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    statuses = []

    @given(case=operation.as_strategy(generation_mode=generation))
    def answers(case: Any) -> None:
        response = case.call(base_url=url, timeout=20)
        statuses.append(response.status_code)
        case.validate_response(response, checks=checks)

    bounded(answers)
    if mode == "positive":
        assert 200 in statuses


def test_it_is_served_and_names_what_exists(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card)
    document = call(app, "GET", "/openapi.json").json()
    assert document == DOCUMENT
    for path, operations in document["paths"].items():
        (method,) = operations
        status = call(app, method.upper(), path.replace("{name}", nano_card.name)).status_code
        assert status in (200, 400), path
