"""How many requests the process works on at a time, and none once it is draining."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.server.refusal import refuse


class Admission:
    """ASGI middleware; ``drain()`` makes it refuse whatever comes from then on.

    Args:
        max_requests: beyond these the answer is 503, in the protocol's shape.
        always: paths that are answered in any case, so that an operator can look.
    """

    def __init__(self, app: ASGIApp, *, max_requests: int, always: frozenset[str]) -> None:
        self._app = app
        self._max_requests = max_requests
        self._always = always
        self._num_running = 0
        self.is_draining = False

    def drain(self) -> None:
        """Refuse new requests; those under way go on."""
        self.is_draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"] in self._always:
            await self._app(scope, receive, send)
        elif self.is_draining:
            headers = {"Retry-After": "5", "Connection": "close"}
            error = HTTPException(503, "the server is shutting down; try again later", headers)
            await refuse(error, scope, receive, send)
        elif self._num_running >= self._max_requests:
            error = HTTPException(
                503,
                f"the server works on {self._max_requests} requests already; try again later",
                {"Retry-After": "1"},
            )
            await refuse(error, scope, receive, send)
        else:
            self._num_running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._num_running -= 1
