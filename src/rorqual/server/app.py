"""The HTTP application: routes, and one shape for every error.

Everything it needs is passed in; it keeps no other state. ``server/run.py`` puts it on a socket.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.errors import EngineClosedError, RorqualError, UnknownModelError
from rorqual.protocol.modes import MODES, ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.bridge import ServingEngine
from rorqual.server.chat import ChatEndpoint
from rorqual.server.failures import failure_of

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Default limit; a million tokens of prompt are about 5 MB."""

KEEPALIVE_S = 15.0
"""Longest silence on a streamed answer."""

SEND_TIMEOUT_S = 60.0
"""Longest wait for a client that stopped reading its answer."""

_CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; nobody is left to read it


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    keepalive_s: float = KEEPALIVE_S,
    send_timeout_s: float = SEND_TIMEOUT_S,
) -> Starlette:
    """The application serving ``card``'s model from ``engine``.

    Routes: ``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /v1/models/NAME``,
    ``GET /health``; the first two also without ``/v1``, as DeepSeek's own base URL has it.
    Closing the engine is the caller's business.

    Raises:
        ConfigError: the tokenizer does not fit the card's prompt layout.
    """
    renderer = Renderer(card, tokenizer, max_context_tokens=engine.max_context_tokens)
    chat = ChatEndpoint(
        engine=engine,
        renderer=renderer,
        max_body_bytes=max_body_bytes,
        keepalive_s=keepalive_s,
        send_timeout_s=send_timeout_s,
    )
    models = _Models(card, renderer.context_tokens, created=int(time.time()))

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

    routes = [Route("/health", health)]
    for base in ("/v1", ""):
        routes += [
            Route(f"{base}/chat/completions", chat.__call__, methods=["POST"]),
            Route(f"{base}/models", models.list),
            Route(f"{base}/models/{{name:path}}", models.get),
        ]
    return Starlette(
        routes=routes,
        exception_handlers={
            RorqualError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _client_left,
            Exception: _refuse,
        },
    )


class _Models:
    """The catalogue: one model under all its names."""

    def __init__(self, card: ModelCard, context_tokens: int, *, created: int) -> None:
        self._entries = {
            name: {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "rorqual",
                "context_length": context_tokens,
                "modes": list(MODES),
                "default_mode": card.default_mode,
                "description": card.description,
            }
            for name in (card.name, *card.aliases)
        }

    async def list(self, _: Request) -> Response:
        """All models."""
        return JSONResponse({"object": "list", "data": [*self._entries.values()]})

    async def get(self, request: Request) -> Response:
        """One model."""
        name: Any = request.path_params["name"]
        if name not in self._entries:
            raise UnknownModelError(
                f"The supported API model names are {', '.join(self._entries)}, "
                f"but you passed {name}.",
                param="model",
            )
        return JSONResponse(self._entries[name])


async def _refuse(_: Request, error: Exception) -> Response:
    return failure_of(error).response()


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
    return failure_of(HTTPException(error.status_code, detail, headers)).response()


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
