"""Bounds on a request's body: its size, declared or not, and the time it takes to arrive."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.server.refusal import refuse


class BodyBounds:
    """ASGI middleware; over the bounds, ``receive`` raises HTTPException 413 or 408."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._is_declared_too_large(scope):
            await refuse(self._too_large(), scope, receive, send)
            return
        num_bytes = 0
        is_complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def receive_bounded() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive in {self._timeout_s:g} s"
                ) from None
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_bounded, send)

    def _is_declared_too_large(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            # isdigit of bytes is ASCII only; what is no length at all is counted as it comes.
            if name == b"content-length" and value.isdigit():
                return len(value) > 18 or int(value) > self._max_bytes
        return False

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_bytes} bytes")
