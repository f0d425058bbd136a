"""Carries an engine's outputs from its thread to the event loop, one request at a time.

The engine's callback never waits: it hands the output to the loop. A reader that falls too far
behind loses its generation rather than the server's memory. Leaving a ``Generation`` before its
last output cancels it in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Protocol

from rorqual.engine.request import Request, TokenOutput
from rorqual.errors import EngineError

MAX_BUFFERED_OUTPUTS = 2_048
"""Outputs a reader may be behind; one is a few hundred bytes."""


class Cancellable(Protocol):
    """What a submitted request can be asked."""

    def cancel(self) -> None:
        """Stop it and free its memory; from any thread, never blocks."""


class Load(Protocol):
    """How busy an engine is."""

    @property
    def num_waiting(self) -> int:
        """Requests not yet started."""

    @property
    def num_running(self) -> int:
        """Requests being worked on."""


class ServingEngine(Protocol):
    """What the server needs of an engine; ``rorqual.engine.engine.Engine`` is one."""

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt plus answer."""

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused for good."""

    @property
    def is_full(self) -> bool:
        """Whether ``submit`` would refuse for overload just now."""

    def submit(self, request: Request, /) -> Cancellable:
        """Queue a request; returns at once.

        Raises EngineOverloadedError, EngineClosedError or RequestError.
        """

    def stats(self) -> Load:
        """A snapshot."""


class SlowReaderError(EngineError):
    """The client reads so slowly that its answer was given up."""


class Generation:
    """One request's outputs, readable on the event loop that made it.

    Use as a context manager around ``submit`` and ``take``; leaving it early cancels the request.
    """

    def __init__(self, *, max_buffered: int = MAX_BUFFERED_OUTPUTS) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_buffered = max_buffered
        self._outputs: deque[TokenOutput] = deque()
        self._arrived = asyncio.Event()
        self._handle: Cancellable | None = None
        self._is_finished = False
        self._has_overflowed = False

    def submit(self, engine: ServingEngine, request: Request) -> None:
        """Start ``request``, whose ``on_output`` must be this one's. Raises as it does."""
        self._handle = engine.submit(request)

    def on_output(self, output: TokenOutput) -> None:
        """The engine's callback; any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._receive, output)

    async def take(self, timeout_s: float) -> list[TokenOutput]:
        """All outputs that have arrived, waiting for at least one; empty after ``timeout_s``.

        Raises:
            SlowReaderError: outputs were dropped because nobody took them.
        """
        # Not wait_for: before Python 3.12 it can swallow a cancellation that meets an output.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._arrived.wait()
        if self._has_overflowed:
            raise SlowReaderError("the answer was given up because the client reads too slowly")
        self._arrived.clear()
        taken = list(self._outputs)
        self._outputs.clear()
        return taken

    def _receive(self, output: TokenOutput) -> None:
        self._is_finished = output.finish_reason is not None
        if len(self._outputs) >= self._max_buffered:
            self._has_overflowed = True
            self._outputs.clear()
            self._cancel()
        elif not self._has_overflowed:
            self._outputs.append(output)
        self._arrived.set()

    def _cancel(self) -> None:
        if self._handle is not None and not self._is_finished:
            self._handle.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cancel()
