"""``GET /openapi.json``: the endpoints, their fields and what they answer, as OpenAPI 3.1.

Written by hand beside the protocols: bodies are validated by ``deepseek-recipe``, which has no
schema to show. A field missing here is ignored by the server; a value outside what is said here is
refused. Which statuses an endpoint has comes from ``failures.ERRORS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import rorqual
from rorqual.protocol.modes import EFFORTS, MODES, ModelCard
from rorqual.server.failures import ERRORS, Wire

_Schema = dict[str, Any]

_TEXT: _Schema = {"type": "string"}
_BOOLEAN: _Schema = {"type": "boolean"}
_COUNT: _Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_SEED: _Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_SAMPLING: Mapping[str, _Schema] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _COUNT,
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 10},
}
_PENALTIES: Mapping[str, _Schema] = {
    name: {"type": "number", "minimum": -2, "maximum": 2}
    for name in ("presence_penalty", "frequency_penalty")
}
_JSON_SCHEMA: _Schema = {"type": "object", "description": "a JSON Schema"}


def openapi_route(card: ModelCard) -> Route:
    """The route of the document about ``card``'s model."""
    document = openapi_document(card)

    async def respond(_: Request) -> Response:
        return JSONResponse(document)

    return Route("/openapi.json", respond)


def openapi_document(card: ModelCard) -> dict[str, Any]:
    """The document; plain JSON data."""
    names = [card.name, *card.aliases]
    suffixed = [f"{name}-{mode}" for name in names for mode in MODES]
    model = _choice(*names, *suffixed)
    efforts = _choice(*EFFORTS[card.generation])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rorqual",
            "version": rorqual.__version__,
            "description": "Paths of OpenAI's protocols also answer without /v1 and below /beta, "
            "those of Anthropic's below /anthropic.",
        },
        "paths": {
            "/v1/chat/completions": _post("chat", _chat(model, efforts), _CHAT_ANSWER),
            "/v1/messages": _post("messages", _messages(model, efforts), _MESSAGE),
            "/v1/messages/count_tokens": _post(
                "messages",
                _messages(model, efforts),
                _object({"input_tokens": _COUNT}),
                events=False,
            ),
            "/v1/responses": _post("responses", _responses(model, efforts), _RESPONSE),
            "/v1/completions": _post("completions", _completions(_choice(*names)), _COMPLETION),
            "/v1/models": _get(_json(_object({"data": _list({"type": "object"})})), 401),
            "/v1/models/{name}": _get(
                _json(_object({"id": _TEXT})), 401, 404, name=_choice(*names)
            ),
            "/health": _get(_json(_object({"status": _TEXT})), 503),
            "/ready": _get(_json(_object({"status": _TEXT})), 503),
            "/metrics": _get({"text/plain": {"schema": _TEXT}}, 401),
        },
        "components": {
            "schemas": {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # The last is none: on this machine alone, no key is asked for.
        "security": [{"bearer": []}, {"x-api-key": []}, {}],
    }


_EVENT: _Schema = {
    "description": "one event of the stream",
    "type": "object",
    "properties": {"event": _TEXT, "data": _TEXT},
    "required": ["data"],
}
"""Before 3.2, OpenAPI has no word for it; tools take a stream's schema as that of each event."""


# ---- operations -------------------------------------------------------------------------------
def _post(wire: Wire, body: _Schema, answer: _Schema, *, events: bool = True) -> dict[str, Any]:
    content = _json(answer)
    if events:
        content["text/event-stream"] = {"schema": _EVENT}
    statuses = {
        (row.anthropic_status or row.status) if wire == "messages" else row.status
        for row in ERRORS.values()
    }
    return {
        "post": {
            "requestBody": {"required": True, "content": _json(body)},
            "responses": {"200": _answer("the answer", content)} | _errors(wire, statuses),
        }
    }


def _get(content: _Schema, *statuses: int, **in_path: _Schema) -> dict[str, Any]:
    return {
        "get": {
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": schema}
                for name, schema in in_path.items()
            ],
            "responses": {"200": _answer("the answer", content)}
            | _errors("chat", {*statuses, 413, 500}),
        }
    }


def _errors(wire: Wire, statuses: set[int]) -> dict[str, Any]:
    name = "AnthropicError" if wire == "messages" else "Error"
    content = _json({"$ref": f"#/components/schemas/{name}"})
    return {str(status): _answer("see docs/api.md", content) for status in sorted(statuses)}


def _answer(description: str, content: _Schema) -> dict[str, Any]:
    return {"description": description, "content": content}


def _json(schema: _Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


# ---- schemas ----------------------------------------------------------------------------------
def _object(required: Mapping[str, _Schema], **optional: _Schema) -> _Schema:
    return {
        "type": "object",
        "required": [*required],
        "properties": {**required, **optional},
    }


def _list(items: _Schema, **bounds: int) -> _Schema:
    return {"type": "array", "items": items, **bounds}


def _choice(*values: str) -> _Schema:
    return {"type": "string", "enum": [*values]}


def _either(*schemas: _Schema) -> _Schema:
    return {"anyOf": [*schemas]}


def _tagged(tag: str, **properties: _Schema) -> _Schema:
    return _object({"type": {"const": tag}} | properties)


def _thinking() -> _Schema:
    kinds = _choice("enabled", "disabled", "adaptive")
    return _object({"type": kinds}, budget_tokens=_COUNT, reserve_tokens=_COUNT)


_STOP = _list({"type": "string", "minLength": 1}, maxItems=16)
_PARTS = _either(_TEXT, _list(_tagged("text", text=_TEXT), minItems=1))
_NAME: _Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": _choice(*ERRORS),
            }
        )
    }
)
_ANTHROPIC_ERROR = _object(
    {
        "type": {"const": "error"},
        "error": _object(
            {
                "type": _choice(*sorted({row.anthropic_type for row in ERRORS.values()})),
                "message": _TEXT,
            }
        ),
    }
)
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_CHAT_ANSWER = _object(
    {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": _TEXT,
        "choices": _list(
            _object({"index": _COUNT, "message": {"type": "object"}, "finish_reason": _TEXT})
        ),
        "usage": _USAGE,
    }
)
_MESSAGE = _object(
    {
        "id": _TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": _TEXT,
        "content": _list(_object({"type": _TEXT})),
        "stop_reason": _choice("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
    }
)
_RESPONSE = _object(
    {
        "id": _TEXT,
        "object": {"const": "response"},
        "status": _choice("completed", "incomplete"),
        "model": _TEXT,
        "output": _list(_object({"type": _TEXT})),
        "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
    }
)
_COMPLETION = _object(
    {
        "id": _TEXT,
        "object": {"const": "text_completion"},
        "model": _TEXT,
        "choices": _list(_object({"index": _COUNT, "text": _TEXT, "finish_reason": _TEXT})),
        "usage": _USAGE,
    }
)


def _chat(model: _Schema, efforts: _Schema) -> _Schema:
    call = _object(
        {
            "id": _TEXT,
            "type": {"const": "function"},
            "function": _object({"name": _NAME, "arguments": _TEXT}),
        }
    )
    message = _either(
        _object({"role": _choice("system", "user", "latest_reminder"), "content": _PARTS}),
        _object(
            {"role": {"const": "assistant"}},
            content={"type": ["string", "null"]},
            reasoning_content={"type": ["string", "null"]},
            tool_calls=_list(call),
            prefix=_BOOLEAN,
        ),
        _object({"role": {"const": "tool"}, "tool_call_id": _TEXT, "content": _PARTS}),
    )
    function = _object({"name": _NAME}, description=_TEXT, parameters=_JSON_SCHEMA, strict=_BOOLEAN)
    named = _object({"name": _TEXT, "schema": _JSON_SCHEMA}, strict=_BOOLEAN)
    return _object(
        {"model": model, "messages": _list(message, minItems=1)},
        stream=_BOOLEAN,
        max_tokens=_COUNT | {"minimum": 1},
        max_completion_tokens=_COUNT | {"minimum": 1},
        thinking=_thinking(),
        reasoning_effort=efforts,
        stop=_either(_TEXT, _STOP),
        seed=_SEED,
        logprobs=_BOOLEAN,
        top_logprobs={"type": "integer", "minimum": 0, "maximum": 20},
        tools=_list(_tagged("function", function=function)),
        tool_choice=_either(
            _choice("none", "auto", "required"),
            _tagged("function", function=_object({"name": _NAME})),
        ),
        parallel_tool_calls=_BOOLEAN,
        response_format=_either(
            _tagged("text"),
            _tagged("json_object"),
            _tagged("json_schema", json_schema=named),
            _tagged("regex", regex=_TEXT),
        ),
        n={"const": 1},
        **_SAMPLING,
        **_PENALTIES,
    )


def _messages(model: _Schema, efforts: _Schema) -> _Schema:
    text = _tagged("text", text=_TEXT)
    blocks = _either(
        text,
        _tagged("thinking", thinking=_TEXT, signature=_TEXT),
        _tagged("tool_use", id=_TEXT, name=_NAME, input={"type": "object"}),
        _tagged("tool_result", tool_use_id=_TEXT, content=_either(_TEXT, _list(text))),
    )
    message = _object(
        {
            "role": _choice("user", "assistant", "system"),
            "content": _either(_TEXT, _list(blocks, minItems=1)),
        }
    )
    tool = _object({"name": _NAME, "input_schema": _JSON_SCHEMA}, description=_TEXT)
    return _object(
        {"model": model, "messages": _list(message, minItems=1)},
        max_tokens=_COUNT | {"minimum": 1},
        system=_either(_TEXT, _list(text)),
        stream=_BOOLEAN,
        thinking=_thinking(),
        output_config=_object(
            {}, effort=efforts, format=_tagged("json_schema", schema=_JSON_SCHEMA)
        ),
        stop_sequences=_STOP,
        tools=_list(tool),
        tool_choice=_either(
            *(_tagged(kind) for kind in ("auto", "any", "none")), _tagged("tool", name=_NAME)
        ),
        temperature={"type": "number", "minimum": 0, "maximum": 2},
        top_p=_SAMPLING["top_p"],
        top_k=_COUNT,
    )


def _responses(model: _Schema, efforts: _Schema) -> _Schema:
    item = _either(
        _object(
            {
                "role": _choice("user", "system", "developer"),
                "content": _either(_TEXT, _list(_tagged("input_text", text=_TEXT), minItems=1)),
            }
        ),
        _tagged("function_call", call_id=_TEXT, name=_NAME, arguments=_TEXT),
        _tagged("function_call_output", call_id=_TEXT, output=_TEXT),
    )
    function = {"type": {"const": "function"}, "name": _NAME}
    tool = _object(function, description=_TEXT, parameters=_JSON_SCHEMA, strict=_BOOLEAN)
    return _object(
        {"model": model, "input": _either(_TEXT, _list(item, minItems=1))},
        instructions=_TEXT,
        stream=_BOOLEAN,
        max_output_tokens=_COUNT | {"minimum": 1},
        reasoning=_object({}, effort=efforts),
        text=_object(
            {},
            format=_either(
                _tagged("text"),
                _tagged("json_object"),
                _tagged("json_schema", name=_TEXT, schema=_JSON_SCHEMA),
            ),
        ),
        tools=_list(tool),
        tool_choice=_either(_choice("none", "auto", "required"), _tagged("function", name=_NAME)),
        parallel_tool_calls=_BOOLEAN,
        temperature=_SAMPLING["temperature"],
        top_p=_SAMPLING["top_p"],
    )


def _completions(model: _Schema) -> _Schema:
    return _object(
        {"model": model, "prompt": _either(_TEXT, _list(_TEXT, minItems=1, maxItems=1))},
        suffix=_TEXT,
        echo=_BOOLEAN,
        max_tokens=_COUNT | {"minimum": 1},
        stream=_BOOLEAN,
        stop=_either(_TEXT, _STOP),
        logprobs={"type": "integer", "minimum": 0, "maximum": 20},
        seed=_SEED,
        **_SAMPLING,
        **_PENALTIES,
    )
