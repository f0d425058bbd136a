"""Keeps web pages out of a server that asks nobody for an API key, except its own and listed ones.

Without permission a page cannot read what it gets, but the browser sends its request all the same:
any page could keep the model busy. One whose host's name suddenly means 127.0.0.1 could even read.
So a page is let in as the server's own only at an address, or at localhost, which always means
this machine. Where keys are asked for, a page has none, and nothing here is needed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.server.refusal import refuse

_WEB = ("http://", "https://", "null")
"""What the origin of a page begins with; the others are programs: editors, extensions."""

_MAX_SHOWN = 200


class Origins:
    """ASGI middleware; a page of another origin gets 403.

    Args:
        allowed: origins let in nevertheless; ``*`` lets in all.
    """

    def __init__(self, app: ASGIApp, *, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self._may(origin, headers.get(b"host", b"").decode("latin-1")):
            await self._app(scope, receive, send)
            return
        await refuse(HTTPException(403, _refusal(origin)), scope, receive, send)

    def _may(self, origin: str, host: str) -> bool:
        if not origin.startswith(_WEB) or origin in self._allowed or "*" in self._allowed:
            return True
        return origin.partition("://")[2] == host and _is_fixed(host)


def _refusal(origin: str) -> str:
    shown = origin if len(origin) <= _MAX_SHOWN else f"{origin[:_MAX_SHOWN]}..."
    return (
        f"pages of {shown} may not use this server, since it asks nobody for an API key; start it "
        f"with --cors-origin {shown} to let them, or with --require-key"
    )


def _is_fixed(host: str) -> bool:
    """Whether nobody else decides what ``host``, with or without a port, stands for."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
