"""How each error looks on the wire: a status, a code, and who is at fault.

``{"code": 404, "message": ..., "error_code": "not_found", "fault": "caller"}`` for REST,
``{"code": "not_found", "message": ..., "fault": "caller"}`` for Connect calls. `fault` is "caller",
"policy" or "operator": what the caller should change, may not do, or can only wait for.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from starlette.responses import JSONResponse

from rorqual.errors import (
    DivergenceError,
    LostExecError,
    RorqualError,
    SandboxFailedError,
    SandboxLostError,
    SandboxRefusedError,
    SandboxRequestError,
    SubstrateMissingError,
    TrajectoryError,
    UnsupportedError,
)
from rorqual.sandbox.control.admission import Refusal

Fault = Literal["caller", "policy", "operator"]

_CONNECT_CODES = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "unimplemented",
    409: "already_exists",
    413: "resource_exhausted",
    415: "invalid_argument",
    429: "resource_exhausted",
    502: "unavailable",
    503: "unavailable",
    507: "resource_exhausted",
}


@dataclass(kw_only=True, eq=False)
class AnswerError(Exception):
    """An answer that is not a success."""

    status: int
    error_code: str
    message: str
    fault: Fault = "caller"
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """What belongs to the status."""
        headers: dict[str, str] = {"X-Rorqual-Fault": self.fault}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> JSONResponse:
        """As REST says it."""
        body = {
            "code": self.status,
            "message": self.message,
            "error_code": self.error_code,
            "fault": self.fault,
        }
        return JSONResponse(body, self.status, self.headers)

    def connect_error(self) -> dict[str, str]:
        """As a Connect call says it."""
        code = _CONNECT_CODES.get(self.status, "unknown")
        return {"code": code, "message": self.message, "fault": self.fault}

    def connect_response(self) -> JSONResponse:
        """A Connect call that failed before its answer began."""
        return JSONResponse(self.connect_error(), self.status, self.headers)


def bad_request(message: str, error_code: str = "invalid_request") -> AnswerError:
    """The caller's mistake."""
    return AnswerError(status=400, error_code=error_code, message=message)


def not_found(message: str) -> AnswerError:
    """There is no such thing, or it is another key's."""
    return AnswerError(status=404, error_code="not_found", message=message)


def sandbox_gone(id: str) -> AnswerError:
    """To calls into a sandbox that has ended: what E2B's proxy in front of dead ones says.

    Its clients understand nothing else as "not running".
    """
    return AnswerError(
        status=502, error_code="sandbox_gone", message=f"The sandbox was not found: {id[:80]!r}"
    )


def over_capacity(refusal: Refusal) -> AnswerError:
    """Admission said no."""
    return AnswerError(
        status=429,
        error_code=refusal.reason,
        message=refusal.message,
        fault="policy" if refusal.reason == "quota" else "operator",
        retry_after_s=refusal.retry_after_s,
    )


def answer_to(error: RorqualError) -> AnswerError:
    """The answer to an error of this project."""
    message = str(error)
    match error:
        case UnsupportedError():
            return bad_request(message, "unsupported")
        case SandboxRequestError(errno=errno.ENOENT | errno.ENOTDIR):
            return not_found(message)
        case SandboxRequestError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            return AnswerError(status=403, error_code="refused", message=message, fault="policy")
        case SandboxRequestError(errno=errno.ENOSPC | errno.EDQUOT):
            return AnswerError(status=507, error_code="disk_limit", message=message)
        case SandboxRequestError(errno=errno.EEXIST):
            return AnswerError(status=409, error_code="exists", message=message)
        case SandboxRequestError():
            return bad_request(message)
        case SandboxRefusedError():
            return AnswerError(status=403, error_code="refused", message=message, fault="policy")
        case DivergenceError():
            return AnswerError(status=409, error_code="divergence", message=message)
        case LostExecError():
            return AnswerError(
                status=410, error_code="lost_exec", message=message, fault="operator"
            )
        case TrajectoryError():
            return AnswerError(status=409, error_code="trajectory", message=message)
        case SandboxLostError():
            return AnswerError(
                status=404, error_code="sandbox_lost", message=message, fault="operator"
            )
        case SubstrateMissingError():
            return AnswerError(
                status=503, error_code="substrate_missing", message=message, fault="operator"
            )
        case SandboxFailedError():
            return AnswerError(
                status=503, error_code="sandbox_failed", message=message, fault="operator"
            )
        case _:
            return AnswerError(status=503, error_code="failed", message=message, fault="operator")
