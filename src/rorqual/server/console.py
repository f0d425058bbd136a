"""The console at ``/``: one static page and the figures its charts draw.

The page's files are in ``console_page``; they are read once and need no build. The page holds
nothing secret and is served to anyone who can connect; what it shows comes from the same endpoints
every client uses, under the same keys, and from ``/console/stats``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.server.bridge import ServingEngine

PUBLIC_PATHS = frozenset({"/", "/console/console.css", "/console/console.js", "/console/icon.svg"})
"""What a browser loads before it can send a key."""

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline: model output can never become code in the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def console_routes(engine: ServingEngine, *, example: str) -> list[Route]:
    """The page, its files and its figures. example: a prompt the page offers; may be empty."""
    folder = resources.files("rorqual.server") / "console_page"
    routes = [
        Route("/" if name == "index.html" else f"/console/{name}", _file(folder / name, kind))
        for name, kind in _TYPES.items()
    ]

    async def stats(_: Request) -> Response:
        return JSONResponse(_figures(engine.stats()))

    async def offered(_: Request) -> Response:
        return JSONResponse({"example": example})

    return [*routes, Route("/console/stats", stats), Route("/console/example", offered)]


def _file(source: Any, kind: str) -> Callable[[Request], Any]:
    content = source.read_bytes()

    async def respond(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return respond


def _figures(stats: Any) -> dict[str, Any]:
    """The engine's counters; a scripted engine has fewer, which count as 0."""
    names = (
        "num_waiting", "num_running", "cache_bytes", "prompt_tokens", "cached_tokens",
        "completion_tokens",
    )  # fmt: skip
    figures: dict[str, Any] = {name: getattr(stats, name, 0) for name in names}
    figures["finished"] = dict(getattr(stats, "finished", {}))
    return figures
