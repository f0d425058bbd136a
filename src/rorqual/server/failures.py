"""Every refusal and failure as a status and an error object in the protocol's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import Response

from rorqual.errors import (
    EngineClosedError,
    EngineOverloadedError,
    RequestError,
    RorqualError,
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a client is told."""

    status: int
    message: str
    kind: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> str:
        """The error object as JSON text."""
        return json.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def response(self) -> Response:
        """A whole HTTP response."""
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


def failure_of(error: Exception) -> Failure:
    """Whose fault ``error`` is, and what to say; unknown errors reveal nothing."""
    match error:
        case RequestError():
            return Failure(
                status=error.status,
                message=str(error),
                kind="invalid_request_error",
                code=error.code,
                param=error.param,
            )
        case EngineOverloadedError():
            return Failure(
                status=429,
                message=str(error),
                kind="rate_limit_error",
                code="engine_overloaded",
                headers={"Retry-After": "1"},
            )
        case EngineClosedError():
            return Failure(
                status=503, message=str(error), kind="server_error", code="engine_closed"
            )
        case RorqualError():
            return Failure(status=500, message=str(error), kind="server_error", code="engine_error")
        case HTTPException():
            return Failure(
                status=error.status_code,
                message=error.detail,
                kind="invalid_request_error",
                code=_HTTP_CODES.get(error.status_code, "invalid_request_error"),
                headers=error.headers or {},
            )
        case _:
            return Failure(
                status=500,
                message="the server has a bug; its log has the details",
                kind="server_error",
                code="internal_error",
            )


_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
}
