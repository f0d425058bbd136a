"""The HTTP application: who may come in, the routes, and one shape for every error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.errors import RorqualError
from rorqual.sandbox.control.envd import Envd
from rorqual.sandbox.control.failures import AnswerError, answer_to, sandbox_gone
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.rest import Rest
from rorqual.sandbox.control.trajectories import Trajectories

_log = logging.getLogger(__name__)
KeyCheck = Callable[[str], str | None]
"""Text of an API key -> id of its owner, or None."""

_OPEN = frozenset({"/health"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", ""})


class Door:
    """ASGI middleware: API keys, or without any this machine's own programs only.

    Calls to one sandbox carry that sandbox's token and are checked where they are answered.
    """

    def __init__(self, app: ASGIApp, keys: KeyCheck | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            request = Request(scope)
            try:
                scope["owner"] = self._owner(request)
            except AnswerError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, request: Request) -> str:
        headers, path = request.headers, request.url.path
        if self._keys is None:
            # A web page on this machine must not start sandboxes, whatever name it reached us by.
            with contextlib.suppress(ValueError):
                host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
                if "origin" not in headers and host in _LOCAL:
                    return ""
            message = "without API keys only programs on this machine are served"
            raise AnswerError(status=403, error_code="origin", message=message, fault="policy")
        if path in _OPEN or path == "/files" or path.startswith(("/process.", "/filesystem.")):
            return ""
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        text = headers.get("x-api-key") or (bearer.strip() if kind.lower() == "bearer" else "")
        try:
            owner = self._keys(text) if text else None
        except RorqualError as error:
            raise answer_to(error) from error
        if owner is None:
            message = "send an API key as 'X-API-Key: KEY' or 'Authorization: Bearer KEY'"
            raise AnswerError(status=401, error_code="api_key", message=message)
        return owner


def create_app(plane: Plane, trajectories: Trajectories, *, keys: KeyCheck | None) -> ASGIApp:
    """The application over an open plane."""

    async def health(request: Request) -> Response:
        """Of one sandbox where a header names it, else of this server."""
        id = request.headers.get("e2b-sandbox-id")
        if id is not None and not plane.exists(id):
            raise sandbox_gone(id)
        return Response(status_code=204)

    async def metrics(_: Request) -> Response:
        return Response(plane.metrics.text(), media_type="text/plain; version=0.0.4")

    envd = Envd(plane)
    routes = [
        *Rest(plane).routes(),
        *envd.routes(),
        *trajectories.routes(),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            AnswerError: _answered,
            RorqualError: _deliberate,
            HTTPException: _http,
            ClientDisconnect: _left,
            Exception: _bug,
        },
    )
    return Door(app, keys)


async def _answered(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnswerError)
    return error.response()


async def _deliberate(_: Request, error: Exception) -> Response:
    assert isinstance(error, RorqualError)
    return answer_to(error).response()


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "http")
    return AnswerError(status=error.status_code, error_code=code, message=error.detail).response()


async def _left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(_: Request, error: Exception) -> Response:
    _log.error("a bug", exc_info=error)
    body = {"code": 500, "message": "internal error", "error_code": "bug", "fault": "operator"}
    return JSONResponse(body, 500)


@contextlib.asynccontextmanager
async def opened(
    plane: Plane, trajectories: Trajectories, *, keep: bool = False
) -> AsyncIterator[None]:
    """The plane and the trajectories, open; ended in order afterwards."""
    await plane.open()
    try:
        yield
    finally:
        await trajectories.close(keep=keep)
        await plane.close(keep=keep)
