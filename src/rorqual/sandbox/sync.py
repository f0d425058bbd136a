"""The same sandbox without ``await``: every method of `Sandbox`, run on its own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rorqual.sandbox.client import Output
from rorqual.sandbox.contract import Capabilities, Entry, ExecResult, SubstrateName
from rorqual.sandbox.sandbox import Endpoint, RunningCommand, Sandbox, Snapshot

T = TypeVar("T")


class _Loop:
    """An event loop in a thread, shared by a sandbox and its forks; ends with the last of them."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.users = 0
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="rorqual-sandbox", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the calling thread ends the work too
            raise

    def release(self) -> None:
        self.users -= 1
        if self.users > 0:
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class SyncCommand:
    """A running command; iterate it for its output."""

    def __init__(self, loop: _Loop, command: RunningCommand) -> None:
        self._loop = loop
        self._command = command

    def __iter__(self) -> Iterator[Output]:
        pieces = aiter(self._command)

        async def following() -> Output | None:
            return await anext(pieces, None)

        while (piece := self._loop.run(following())) is not None:
            yield piece

    def _call(self, method: str, *arguments: Any) -> None:
        async def call() -> None:
            getattr(self._command, method)(*arguments)

        self._loop.run(call())

    def write(self, data: bytes) -> None:
        """Give it bytes on stdin."""
        self._loop.run(self._command.write(data))

    def close_stdin(self) -> None:
        """Tell it that no more input comes."""
        self._call("close_stdin")

    def send_signal(self, number: int) -> None:
        """Signal its process group."""
        self._call("send_signal", number)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._call("resize", rows, columns)

    def kill(self) -> None:
        """Kill it and everything it started."""
        self._call("kill")

    def result(self) -> ExecResult:
        """Wait for its end."""
        return self._loop.run(self._command.result())


class SyncSandbox:
    """A sandbox for code that is not asynchronous; see `Sandbox` for what each method does."""

    def __init__(self, loop: _Loop, sandbox: Sandbox) -> None:
        self._loop = loop
        self._sandbox = sandbox
        self._ended = False
        loop.users += 1

    @classmethod
    def create(
        cls,
        substrate: SubstrateName = "container",
        *,
        files: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> SyncSandbox:
        """See `Sandbox.create`."""
        loop = _Loop()
        try:
            sandbox = loop.run(Sandbox.create(substrate, files=files, **options))
        except BaseException:
            loop.release()
            raise
        return cls(loop, sandbox)

    @property
    def id(self) -> str:
        """Its name on this machine."""
        return self._sandbox.id

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self._sandbox.capabilities

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended, as far as is known here."""
        return not self._ended and self._sandbox.is_alive

    def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:
        """Run a command to its end."""
        return self._loop.run(self._sandbox.exec(command, **options))

    def start(self, command: str | Sequence[str], **options: Any) -> SyncCommand:
        """Start a command and stream its output."""
        return SyncCommand(self._loop, self._loop.run(self._sandbox.start(command, **options)))

    def pty(self, command: str | Sequence[str] = ("/bin/sh", "-i"), **options: Any) -> SyncCommand:
        """Start a command on a terminal of its own."""
        return SyncCommand(self._loop, self._loop.run(self._sandbox.pty(command, **options)))

    def read(self, path: str, *, user: str | None = None) -> bytes:
        """Contents of a regular file."""
        return self._loop.run(self._sandbox.read(path, user=user))

    def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, user: str | None = None
    ) -> None:
        """Write a file, making its parent directories."""
        self._loop.run(self._sandbox.write(path, data, mode=mode, user=user))

    def list(self, path: str) -> Sequence[Entry]:
        """The names in a directory."""
        return self._loop.run(self._sandbox.list(path))

    def mkdir(self, path: str) -> None:
        """Make a directory and its parents."""
        self._loop.run(self._sandbox.mkdir(path))

    def remove(self, path: str) -> None:
        """Remove a file or a directory."""
        self._loop.run(self._sandbox.remove(path))

    def upload(self, local: Path | str, path: str) -> None:
        """Copy a file or a directory into the sandbox."""
        self._loop.run(self._sandbox.upload(local, path))

    def download(self, path: str, local: Path | str) -> None:
        """Copy a file or a directory out of the sandbox."""
        self._loop.run(self._sandbox.download(path, local))

    def snapshot(self) -> Snapshot:
        """Keep the present state."""
        return self._loop.run(self._sandbox.snapshot())

    def fork(self, count: int = 1) -> Sequence[SyncSandbox]:
        """New sandboxes that start from this one's present state."""
        forks = self._loop.run(self._sandbox.fork(count))
        return [SyncSandbox(self._loop, fork) for fork in forks]

    def pause(self) -> None:
        """Stop all of it from running."""
        self._loop.run(self._sandbox.pause())

    def resume(self) -> None:
        """Go on after `pause`."""
        self._loop.run(self._sandbox.resume())

    def expose(self, port: int) -> Endpoint:
        """Make a port of the sandbox reachable on this machine's loopback."""
        return self._loop.run(self._sandbox.expose(port))

    def kill(self) -> None:
        """End it and remove everything of it."""
        if self._ended:
            return
        self._ended = True
        try:
            self._loop.run(self._sandbox.kill())
        finally:
            self._loop.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
