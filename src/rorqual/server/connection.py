"""One HTTP connection: uvicorn's, with a limit on the time its client takes to ask something."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closed when a request's line and headers are not complete in ``header_timeout_s``.

    uvicorn itself waits for ever for a client that connects and sends nothing, or half a header.
    """

    header_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called once, by the event loop."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Called with whatever arrives, by the event loop."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once, by the event loop."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _watch(self) -> None:
        is_asking = self.cycle is None or self.cycle.response_complete
        if not is_asking:
            self._forget_deadline()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
