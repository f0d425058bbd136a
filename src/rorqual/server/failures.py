"""Every refusal and failure as a status and an error object in the protocol's shape.

``ERRORS`` is the one table: what happened -> what each protocol's clients are told. Chat
Completions, Responses and completions share OpenAI's shape; Messages has Anthropic's, and its own
status for overload.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response

from rorqual.errors import (
    EngineClosedError,
    EngineOverloadedError,
    RequestError,
    RorqualError,
)
from rorqual.protocol.parse import Event

Wire = Literal["chat", "messages", "responses", "completions"]

MESSAGES_PATHS = ("/v1/messages", "/anthropic/")
"""What the paths of Anthropic's protocol begin with."""

_MAX_CHARS = 1000
"""Of what an error says: it may repeat a text of the client's, which may be any length."""


class Row(NamedTuple):
    """What the clients of one error see."""

    status: int
    type: str
    """OpenAI's ``error.type``."""
    anthropic_type: str
    """Anthropic's ``error.type``."""
    anthropic_status: int | None = None
    """Where Anthropic's status is another."""


ERRORS: Mapping[str, Row] = MappingProxyType(
    {
        "invalid_request_error": Row(400, "invalid_request_error", "invalid_request_error"),
        "context_length_exceeded": Row(400, "invalid_request_error", "invalid_request_error"),
        "invalid_api_key": Row(401, "invalid_request_error", "authentication_error"),
        "permission_denied": Row(403, "invalid_request_error", "permission_error"),
        "model_not_found": Row(404, "invalid_request_error", "not_found_error"),
        "not_found": Row(404, "invalid_request_error", "not_found_error"),
        "method_not_allowed": Row(405, "invalid_request_error", "invalid_request_error"),
        "request_timeout": Row(408, "invalid_request_error", "timeout_error"),
        "request_too_large": Row(413, "invalid_request_error", "request_too_large"),
        "rate_limit_exceeded": Row(429, "rate_limit_error", "rate_limit_error"),
        "engine_overloaded": Row(429, "rate_limit_error", "overloaded_error", 529),
        "engine_closed": Row(503, "server_error", "overloaded_error"),
        "unavailable": Row(503, "server_error", "overloaded_error"),
        "engine_error": Row(500, "server_error", "api_error"),
        "internal_error": Row(500, "server_error", "api_error"),
    }
)
"""OpenAI's ``error.code`` -> the rest."""

_HTTP_CODES: Mapping[int, str] = MappingProxyType(
    {
        401: "invalid_api_key",
        403: "permission_denied",
        404: "not_found",
        405: "method_not_allowed",
        408: "request_timeout",
        413: "request_too_large",
        429: "rate_limit_exceeded",
        503: "unavailable",
    }
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a client is told."""

    code: str
    """A key of ``ERRORS``."""
    message: str
    param: str | None = None
    """Path of the field at fault, where that is known."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def status(self, wire: Wire = "chat") -> int:
        """The HTTP status."""
        row = ERRORS[self.code]
        return (row.anthropic_status or row.status) if wire == "messages" else row.status

    def body(self, wire: Wire = "chat") -> str:
        """The error object as JSON text."""
        return json.dumps(self._object(wire))

    def response(self, wire: Wire = "chat") -> Response:
        """A whole HTTP response."""
        return Response(
            self.body(wire),
            self.status(wire),
            headers=self.headers,
            media_type="application/json",
        )

    def events(self, wire: Wire, answer_id: str, num_sent: int) -> list[Event]:
        """What ends a stream that has sent ``num_sent`` events already."""
        if wire == "messages":
            return [Event("error", self.body(wire))]
        if wire != "responses":
            return [Event(None, self.body(wire))]
        error = {"code": self.code, "message": self.message}
        failed = {"id": answer_id, "object": "response", "status": "failed", "error": error}
        first = {"type": "error", **error, "param": self.param, "sequence_number": num_sent}
        last = {"type": "response.failed", "response": failed, "sequence_number": num_sent + 1}
        return [Event("error", json.dumps(first)), Event("response.failed", json.dumps(last))]

    def _object(self, wire: Wire) -> Mapping[str, object]:
        row = ERRORS[self.code]
        if wire == "messages":
            error = {"type": row.anthropic_type, "message": self.message}
            return {"type": "error", "error": error}
        return {
            "error": {
                "message": self.message,
                "type": row.type,
                "param": self.param,
                "code": self.code,
            }
        }


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return text
    return f"{text[: _MAX_CHARS // 2]} ... {text[-_MAX_CHARS // 2 :]}"


def wire_of(path: str) -> Wire:
    """The protocol in whose shape errors at ``path`` are told."""
    return "messages" if path.startswith(MESSAGES_PATHS) else "chat"


def failure_of(error: Exception) -> Failure:
    """Whose fault ``error`` is, and what to say; unknown errors reveal nothing."""
    match error:
        case RequestError():
            param = error.param and _shortened(error.param)
            return Failure(code=error.code, message=_shortened(str(error)), param=param)
        case EngineOverloadedError():
            headers = {"Retry-After": "1"}
            return Failure(code="engine_overloaded", message=str(error), headers=headers)
        case EngineClosedError():
            return Failure(code="engine_closed", message=str(error))
        case RorqualError():
            return Failure(code="engine_error", message=str(error))
        case HTTPException():
            other = "internal_error" if error.status_code >= 500 else "invalid_request_error"
            return Failure(
                code=_HTTP_CODES.get(error.status_code, other),
                message=_shortened(error.detail),
                headers=error.headers or {},
            )
        case _:
            message = "the server has a bug; its log has the details"
            return Failure(code="internal_error", message=message)
