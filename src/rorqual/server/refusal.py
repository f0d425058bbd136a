"""Sends a refusal in the error shape of the protocol that a path belongs to."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from rorqual.server.failures import failure_of, wire_of


async def refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with ``error`` instead of calling an application."""
    await failure_of(error).response(wire_of(scope["path"]))(scope, receive, send)
