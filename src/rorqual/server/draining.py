"""uvicorn's server, ending in good order: finish what runs, up to a limit, then cut it short.

The first SIGTERM or SIGINT begins it: no new connection is accepted, idle ones are closed, a new
request on a busy one gets 503. At the limit, or at a second signal, the engine is told to end what
it runs, so that streams close with an error event; who still holds on is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn

from rorqual.server.app import Application
from rorqual.server.connection import Connection

_TICK_S = 0.05
_LAST_WORDS_S = 1.0
"""For answers that were cut short to say so."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DrainingServer(uvicorn.Server):
    """Serves an ``Application`` until a signal, or until ``should_exit`` is set.

    Args:
        drain_s: time that running answers get to finish.
        end_running: makes the engine give up what it runs; called once, on a worker thread.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: Application,
        *,
        drain_s: float,
        end_running: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._application = app
        self._drain_s = drain_s
        self._end_running = end_running
        self._is_cut_short = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called at a signal: the first begins to drain, the second ends it."""
        self._is_cut_short = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take the signals for the length of the block; unlike uvicorn, do not raise them again.

        Off the main thread, where signals never arrive, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once when the server is to end; returns when all requests have."""
        self._application.drain()
        ending = asyncio.create_task(self._cut_short_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _cut_short_in_time(self) -> None:
        await self._wait(self._drain_s, until_cut_short=True)
        if self._end_running is not None:
            await asyncio.to_thread(self._end_running)
            await self._wait(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.abort()

    async def _wait(self, seconds: float, *, until_cut_short: bool = False) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.server_state.connections and loop.time() < deadline:
            if until_cut_short and self._is_cut_short:
                return
            await asyncio.sleep(_TICK_S)
