"""Warm sandboxes: started ahead, so that taking one costs nothing but a queue's pop.

One shelf per set of options. A shelf that falls below its low watermark is filled up to the high
one in the background; when no one is ready a taker starts its own. Nothing is ever put back: a
sandbox that was used is not clean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Self

from rorqual.errors import SandboxError, SandboxLostError, SandboxRequestError
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, start_sandbox

Start = Callable[[SandboxOptions], Awaitable[Sandbox]]


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """How many are kept ready for one set of options.

    Attributes:
        low: below this, filling starts.
        high: filling stops here.
        at_once: how many are started at the same time.
    """

    low: int = 2
    high: int = 8
    at_once: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high and self.high >= 1 and self.at_once >= 1):
            raise SandboxRequestError(f"watermarks {self}: 0 <= low <= high, 1 <= high, at_once")


@dataclass
class _Shelf:
    options: SandboxOptions
    ready: deque[Sandbox] = field(default_factory=deque)
    filling: asyncio.Task[None] | None = None
    error: SandboxError | None = None


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Counts since the pool was opened.

    Attributes:
        ready: sandboxes that wait now.
        warm: takes that were answered by one of them.
        cold: takes that had to start their own.
        dead: ready ones that had ended before they were taken.
    """

    ready: int
    warm: int
    cold: int
    dead: int


class WarmPool:
    """A pool in one event loop; use it as a context manager, or `close` it.

    Args:
        start: how a sandbox is started.
    """

    def __init__(
        self, watermarks: Watermarks | None = None, *, start: Start = start_sandbox
    ) -> None:
        self.watermarks = watermarks or Watermarks()
        self._start = start
        self._shelves: dict[str, _Shelf] = {}
        self._warm = self._cold = self._dead = 0
        self._closed = False

    @property
    def stats(self) -> PoolStats:
        """The counts so far."""
        ready = sum(len(shelf.ready) for shelf in self._shelves.values())
        return PoolStats(ready=ready, warm=self._warm, cold=self._cold, dead=self._dead)

    async def warm(self, options: SandboxOptions) -> None:
        """Fill the shelf of `options` and wait until it is full.

        Raises:
            SandboxError: one could not be started.
        """
        shelf = self._shelf(options)
        self._fill(shelf)
        if shelf.filling is not None:
            await asyncio.shield(shelf.filling)
        if shelf.error is not None:
            raise shelf.error

    async def take(self, options: SandboxOptions) -> Sandbox:
        """A clean sandbox, the caller's from now on: a ready one, or one started now.

        Raises:
            SandboxError: it had to be started and could not.
        """
        shelf = self._shelf(options)
        try:
            while shelf.ready:
                sandbox = shelf.ready.popleft()
                if sandbox.is_alive:
                    self._warm += 1
                    return sandbox
                self._dead += 1
                with contextlib.suppress(SandboxError):
                    await sandbox.kill()
        finally:
            if len(shelf.ready) < self.watermarks.low:
                self._fill(shelf)
        self._cold += 1
        return await self._start(options)

    async def close(self) -> None:
        """Kill what waits and what is being started; sandboxes that were taken stay."""
        self._closed = True
        filling = [shelf.filling for shelf in self._shelves.values() if shelf.filling is not None]
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        waiting = [sandbox for shelf in self._shelves.values() for sandbox in shelf.ready]
        self._shelves.clear()
        results = await asyncio.gather(*(s.kill() for s in waiting), return_exceptions=True)
        if errors := [result for result in results if isinstance(result, BaseException)]:
            raise errors[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- filling
    def _shelf(self, options: SandboxOptions) -> _Shelf:
        if self._closed:
            raise SandboxLostError("the pool is closed")
        if options.ttl_s is not None:
            raise SandboxRequestError(
                "ttl_s counts from the start: a warm sandbox would be younger"
            )
        key = json.dumps(asdict(options), default=str, sort_keys=True)
        return self._shelves.setdefault(key, _Shelf(options))

    def _fill(self, shelf: _Shelf) -> None:
        if shelf.filling is None and not self._closed:
            shelf.filling = asyncio.get_running_loop().create_task(self._fill_up(shelf))
            shelf.filling.add_done_callback(lambda _: setattr(shelf, "filling", None))

    async def _fill_up(self, shelf: _Shelf) -> None:
        shelf.error = None
        try:
            while (missing := self.watermarks.high - len(shelf.ready)) > 0:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(missing, self.watermarks.at_once)):
                        group.create_task(self._add(shelf))
        except* SandboxError as errors:
            # Whoever needs one meets the same error at its own start; trying on helps nobody.
            first = errors.exceptions[0]
            shelf.error = first if isinstance(first, SandboxError) else None

    async def _add(self, shelf: _Shelf) -> None:
        # Shielded: a start that is cancelled half-way must not leave a sandbox nobody knows of.
        start = asyncio.ensure_future(self._start(shelf.options))
        try:
            sandbox = await asyncio.shield(start)
        except asyncio.CancelledError:
            with contextlib.suppress(SandboxError):
                await (await start).kill()
            raise
        shelf.ready.append(sandbox)
