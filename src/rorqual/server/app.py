"""The HTTP application: doors around routes, and one shape for every error.

From outside in: a record of each request (``observing``), cross-origin permission (Starlette's),
admission, API keys and their limits or else ``origins``, bounds on the body, then the router. Each
is plain ASGI and keeps its own state; everything they need is passed in. ``server/run.py`` puts it
on a socket.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.errors import EngineClosedError, RorqualError
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.access_log import AccessLog
from rorqual.server.admission import Admission
from rorqual.server.authentication import Authentication
from rorqual.server.body import BodyBounds
from rorqual.server.bridge import ServingEngine
from rorqual.server.console import PUBLIC_PATHS, console_routes
from rorqual.server.endpoint import WARNING_HEADER
from rorqual.server.failures import failure_of, wire_of
from rorqual.server.history import History
from rorqual.server.keys import KeyRing
from rorqual.server.limits import Limits
from rorqual.server.metrics import Metrics
from rorqual.server.observing import Observing
from rorqual.server.openapi import openapi_route
from rorqual.server.origins import Origins
from rorqual.server.routes import protocol_routes

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Default limit; a million tokens of prompt are about 5 MB."""

BODY_TIMEOUT_S = 60.0
"""Longest wait for a client to send its body."""

KEEPALIVE_S = 15.0
"""Longest silence on a streamed answer."""

SEND_TIMEOUT_S = 60.0
"""Longest wait for a client that stopped reading its answer, under an ASGI server that has no such
limit; ``server/connection.py`` has, a shorter one."""

MAX_REQUESTS = 2048
"""Requests under way at a time, streams included."""

_STATUS_PATHS = frozenset({"/health", "/ready"})
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; nobody is left to read it
_EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    WARNING_HEADER.decode(),
    *(
        header
        for kind in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
        for header in (f"x-ratelimit-{what}-{kind}", f"anthropic-ratelimit-{kind}-{what}")
    ),
)


class Application:
    """An ASGI application that can be told to let nobody in any more."""

    def __init__(self, app: ASGIApp, router: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._router = router
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer the server's start-up and shutdown messages."""
        # The doors know HTTP only; the router has nothing else to serve and says so.
        app = self._app if scope["type"] == "http" else self._router
        await app(scope, receive, send)

    def drain(self) -> None:
        """Refuse new requests, and say so at ``/ready``; those under way go on."""
        self._admission.drain()


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    keys: KeyRing | None = None,
    history: History | None = None,
    access_log: AccessLog | None = None,
    cors_origins: Sequence[str] = (),
    max_requests: int = MAX_REQUESTS,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    keepalive_s: float = KEEPALIVE_S,
    send_timeout_s: float = SEND_TIMEOUT_S,
) -> Application:
    """The application serving ``card``'s model from ``engine``.

    Routes: those of ``server/routes.py`` and ``server/console.py``; ``GET /health`` (it lives),
    ``/ready`` (it takes requests), ``/metrics``,
    ``/openapi.json``. Closing engine, keys and log is the caller's
    business.

    Args:
        keys: who may use it; None lets everybody who can connect.
        history: remembers answers between requests; None does so in memory only.
        cors_origins: web pages from elsewhere that may use it; none by default.

    Raises:
        ConfigError: the tokenizer does not fit the card's prompt layout.
    """
    metrics = Metrics(engine.stats, lambda: admission.is_draining)
    origins = [origin.rstrip("/") for origin in cors_origins]  # as browsers write them

    async def health(_: Request) -> Response:
        if engine.is_closed:
            raise EngineClosedError("the engine is shut down")
        load = engine.stats()
        return JSONResponse(
            {
                "status": "ok",
                "model": card.name,
                "num_running": load.num_running,
                "num_waiting": load.num_waiting,
            }
        )

    async def ready(_: Request) -> Response:
        if admission.is_draining or engine.is_closed:
            raise EngineClosedError("the server is shutting down")
        return JSONResponse({"status": "ready"})

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics.endpoint),
        openapi_route(card),
        *console_routes(engine, example=card.example),
        *protocol_routes(
            engine,
            tokenizer,
            card,
            history=history,
            keepalive_s=keepalive_s,
            send_timeout_s=send_timeout_s,
        ),
    ]
    router = Starlette(
        routes=routes,
        exception_handlers={
            RorqualError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _client_left,
            Exception: _refuse,
        },
    )
    app: ASGIApp = BodyBounds(router, max_bytes=max_body_bytes, timeout_s=body_timeout_s)
    if keys is None:
        app = Origins(app, allowed=origins)
    else:
        app = Limits(app)
        app = Authentication(app, keys=keys, open_paths=_STATUS_PATHS | PUBLIC_PATHS)
    app = admission = Admission(app, max_requests=max_requests, always=_STATUS_PATHS | {"/metrics"})
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app = Observing(
        app,
        routes={route.endpoint: route.path for route in reversed(routes)},
        times=metrics,
        reports=[metrics.report, *([access_log.report] if access_log else [])],
    )
    return Application(app, router, admission)


async def _refuse(request: Request, error: Exception) -> Response:
    return failure_of(error).response(wire_of(request.url.path))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path}; try POST /v1/chat/completions"
    elif error.status_code == 405:
        allowed = (headers or {}).get("Allow", "other methods")
        detail = f"{request.url.path} does not take {request.method}, only {allowed}"
    else:
        detail = error.detail
    failure = failure_of(HTTPException(error.status_code, detail, headers))
    return failure.response(wire_of(request.url.path))


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
