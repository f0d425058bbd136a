"""A sandbox of another host: the same class as a local one, over calls to that host's worker.

What is sent is sent once. A call whose answer does not come is an error, never a second call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from rorqual.errors import SandboxError, SandboxLostError, SandboxRequestError, UnsupportedError
from rorqual.sandbox.client import Output
from rorqual.sandbox.contract import Entry, ExecRequest, ExecResult
from rorqual.sandbox.control.hosts import Line
from rorqual.sandbox.control.machine import Known
from rorqual.sandbox.control.worker import Described
from rorqual.sandbox.sandbox import Sandbox


class RemoteSandbox(Sandbox):
    """A sandbox that `line`'s host holds under `name`.

    Args:
        release: gives its room back; called once, when it is killed.
    """

    def __init__(
        self,
        name: str,
        described: Described,
        line: Line,
        *,
        linger_s: float,
        release: Callable[[], Awaitable[None]],
    ) -> None:
        self.name = name
        self.id = described.guest
        # The host's worker holds it when we die, whatever its substrate.
        self.options = dataclasses.replace(described.options, linger_s=linger_s)
        # A snapshot or a port would be the other host's.
        self.capabilities = dataclasses.replace(described.capabilities, snapshot=None, expose=False)
        self.is_lost = False
        self._line = line
        self._release = release
        self._is_paused = False
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        return not self.is_lost

    @property
    def known(self) -> Known:
        """How to find it again after its worker died."""
        return Known(self.name, self.id, self.options.substrate, self._is_paused)

    # -- commands
    async def dispatch(self, request: ExecRequest, *, keep_output: bool) -> RemoteCommand:
        command = RemoteCommand(self, keep_output=keep_output)
        try:
            await self._line.call("dispatch", self.name, command.key, request, keep_output)
        except asyncio.CancelledError:  # it was sent: nobody would ever ask for its end
            command.kill()
            raise
        return command

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call the worker about a command."""
        return await self._line.call(method, *arguments)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call the worker about a command, and do not wait; calls arrive in this order."""
        task = asyncio.ensure_future(self._told(method, *arguments))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _told(self, method: str, *arguments: Any) -> None:
        with contextlib.suppress(SandboxError):  # whoever waits for the command hears of it
            await self._line.call(method, *arguments)

    # -- files
    async def _file(self, call: str, *arguments: Any, **options: Any) -> Any:
        return await self._line.call("file", self.name, call, arguments, **options)

    async def read(self, path: str, *, user: str | None = None) -> bytes:
        data: bytes = await self._file("read", path, user=user)
        return data

    async def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, user: str | None = None
    ) -> None:
        await self._file("write", path, data, mode=mode, user=user)

    async def list(self, path: str) -> list[Entry]:
        entries: list[Entry] = await self._file("list", path)
        return entries

    async def mkdir(self, path: str) -> None:
        await self._file("mkdir", path)

    async def remove(self, path: str) -> None:
        await self._file("remove", path)

    # -- state
    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        raise UnsupportedError("a sandbox of another host cannot be forked from here")

    async def pause(self) -> None:
        await self._line.call("pause", self.name)
        self._is_paused = True

    async def resume(self) -> None:
        await self._line.call("resume", self.name)
        self._is_paused = False

    async def kill(self) -> None:
        self.is_lost = True
        try:
            with contextlib.suppress(SandboxLostError):  # gone with its host
                await self._line.call("kill", self.name, self.id)
        finally:
            await self._release()


class RemoteCommand:
    """A command of a `RemoteSandbox`; see `RunningCommand`.

    Output is fetched when it is asked for: a command nobody listens to stops at its window, as it
    does on one host.
    """

    def __init__(self, sandbox: RemoteSandbox, *, keep_output: bool) -> None:
        self.key = secrets.token_hex(8)
        self._sandbox = sandbox
        self._keep_output = keep_output

    def __aiter__(self) -> AsyncIterator[Output]:
        if self._keep_output:
            raise SandboxRequestError("the output of this command is collected for its result")
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Output]:
        while pieces := await self._sandbox.ask("take", self.key):
            for piece in pieces:
                yield piece

    async def write(self, data: bytes) -> None:
        await self._sandbox.ask("feed", self.key, data)

    def close_stdin(self) -> None:
        self._sandbox.tell("close_stdin", self.key)

    def send_signal(self, number: int) -> None:
        self._sandbox.tell("signal", self.key, number)

    def resize(self, rows: int, columns: int) -> None:
        self._sandbox.tell("resize", self.key, rows, columns)

    def kill(self) -> None:
        self._sandbox.tell("stop", self.key)

    async def result(self) -> ExecResult:
        try:
            result: ExecResult = await self._sandbox.ask("result", self.key)
        except asyncio.CancelledError:
            self.kill()
            raise
        return result
