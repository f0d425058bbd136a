"""The function substrate: stateless calls of JavaScript or Python through the common contract.

``exec(["js", "-e", SOURCE])`` and ``exec(["python", "-c", SOURCE])``, or a path to a given file
instead of the option. Nothing survives a call but the files the host wrote, which scripts can only
read (`/data` in Python). There are no processes, terminals, ports or pauses.

With ``isolation="container"`` Python calls run the machine's CPython in a warm container each.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import inspect
import itertools
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox.client import Channel, Output
from rorqual.sandbox.contract import Capabilities, Entry, ExecRequest, ExecResult, ExecStatus
from rorqual.sandbox.function import channel
from rorqual.sandbox.function.process import Engine, Worker
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.output import OutputBuffer
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions

if TYPE_CHECKING:  # containers are only needed where they were asked for
    from rorqual.sandbox.function.container import ContainerCalls

Tool = Callable[..., Any | Awaitable[Any]]

_PROGRAMS: dict[str, tuple[Engine, str]] = {
    "js": ("javascript", "-e"),
    "qjs": ("javascript", "-e"),
    "node": ("javascript", "-e"),
    "python": ("python", "-c"),
    "python3": ("python", "-c"),
}

CAPABILITIES = Capabilities(
    processes=False,
    pty=False,
    users=False,
    network=False,
    expose=False,
    pause=False,
    snapshot=None,
    survives_host=False,
    enforced=frozenset({"memory", "disk", "processes", "output", "wall"}),
    boundary="the language engine, in a process without files, sockets or programs",
)

CONTAINER_BOUNDARY = (
    "JavaScript: the language engine, in a process without files, sockets or programs; "
    "Python: a container for each call"
)


class FunctionSandbox(Sandbox):
    """Function calls against one set of given files; see the module."""

    def __init__(self, options: SandboxOptions, directory: Path, lock: int, cache: Path) -> None:
        self.id = directory.name
        self.options = options
        self.capabilities = CAPABILITIES
        self.tools: Mapping[str, Tool] = {}
        self._directory = directory
        self._held = lock
        self._files = directory / "files"
        self._files.mkdir()
        self._cache = cache
        self._workers: dict[Engine, Worker] = {}
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._ended = False
        self._containers: ContainerCalls | None = None
        if options.isolation == "container":
            from rorqual.sandbox.function.container import ContainerCalls

            self._containers = ContainerCalls(options, self._files, directory / "output")
            self.capabilities = replace(CAPABILITIES, boundary=CONTAINER_BOUNDARY)

    @classmethod
    async def open(cls, options: SandboxOptions) -> FunctionSandbox:
        """Make one; workers start with the first call of each language."""
        if options.isolation not in (None, "container"):
            raise SandboxRequestError(
                f'functions have isolation="container" or none, not {options.isolation!r}'
            )
        for name in ("image", "snapshot", "network"):
            if getattr(options, name) is not None and (name, options.isolation) != (
                "image",
                "container",
            ):
                raise UnsupportedError(f"functions take no {name}")
        if options.linger_s:
            raise UnsupportedError("a function sandbox ends with its creator")
        layout = Layout(options.root)
        directory = layout.sandboxes / secrets.token_hex(8)
        directory.mkdir(parents=True, mode=0o700)
        # Held while this process lives; what has an unheld lock is swept.
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(options, directory, lock, layout.root / "wasm")

    def with_tools(self, tools: Mapping[str, Tool]) -> FunctionSandbox:
        """Offer host functions as ``tools.name(...)``, after ``import tools`` in Python.

        Arguments and answers are JSON; a tool that fails raises an exception inside. Calls that
        run in containers have none.
        """
        self.tools = dict(tools)
        return self

    async def warm(self, engine: Engine) -> None:
        """Start the worker of a language ahead of its first call."""
        if engine == "python" and self._containers is not None:
            await self._containers.warm()
        elif engine not in self._workers:
            self._workers[engine] = await Worker.start(
                engine, self.options.limits.memory_bytes, self._files, self._cache
            )

    # -- calls
    async def dispatch(self, request: ExecRequest, *, keep_output: bool) -> FunctionCall:
        if self._ended:
            raise SandboxLostError("the sandbox is gone")
        if request.stdin is None:
            raise UnsupportedError("a function's stdin is given with the call")
        if request.cwd is not None:
            raise UnsupportedError("a function has no working directory")
        engine, source, arguments = self._parse(request)
        return FunctionCall(self, request, engine, source, arguments)

    def _parse(self, request: ExecRequest) -> tuple[Engine, str, list[str]]:
        program = PurePosixPath(request.argv[0]).name
        if program not in _PROGRAMS:
            raise UnsupportedError(
                f"functions run {', '.join(sorted(_PROGRAMS))}; not {request.argv[0]!r}"
            )
        engine, option = _PROGRAMS[program]
        rest = list(request.argv[1:])
        if rest and rest[0] == option and len(rest) >= 2:
            return engine, rest[1], rest[2:]
        if rest and not rest[0].startswith("-"):
            return engine, self._source(rest[0]), rest[1:]
        raise SandboxRequestError(f"usage: {program} {option} SOURCE [ARGUMENT...] or FILE")

    def _source(self, path: str) -> str:
        try:
            return self._host_path(path).read_text("utf-8")
        except OSError as error:
            raise SandboxRequestError(f"{path!r}: {error.strerror}", errno=error.errno) from None
        except UnicodeDecodeError:
            raise SandboxRequestError(f"{path!r} is no text in UTF-8") from None

    async def run(
        self, request: ExecRequest, engine: Engine, source: str, arguments: list[str]
    ) -> ExecResult:
        """Run one call to its end."""
        if engine == "python" and self._containers is not None:
            argv = ["python3", "-c", source, *arguments]
            return await self._containers.run(next(self._numbers), request, argv)
        limits = self.options.limits
        number = next(self._numbers)
        buffers = {
            kind: OutputBuffer(
                self._directory / "output" / f"{number}.{name}",
                keep_bytes=limits.output_bytes,
                limit_bytes=limits.spill_bytes,
            )
            for kind, name in ((channel.STDOUT, "stdout"), (channel.STDERR, "stderr"))
        }
        assert request.stdin is not None
        call = {
            "source": source,
            "args": arguments,
            "stdin": base64.b64encode(request.stdin).decode(),
            "env": dict(request.env),
            "timeout_s": request.timeout_s,
            "has_tools": bool(self.tools),
        }
        loop = asyncio.get_running_loop()
        async with self._lock:
            await self.warm(engine)
            worker = self._workers[engine]
            started = loop.time()
            try:
                async with asyncio.timeout(request.timeout_s + 0.1):
                    end = await self._converse(worker, call, buffers)
            except TimeoutError:
                end = {"code": -1}
            except (asyncio.IncompleteReadError, ConnectionError):
                end = {"code": 137}
            except BaseException:
                await self._discard(engine)
                raise
            if end.get("cpu_s") is None:  # overrun, flooded or dead: this worker is of no more use
                await self._discard(engine)
        for buffer in buffers.values():
            buffer.close()
        status: ExecStatus = "exited"
        code = int(end["code"])
        if code == -1:
            status, code = "timed-out", 137
        elif code == -2:
            raise SandboxFailedError(bytes(buffers[channel.STDERR].head).decode("utf-8", "replace"))
        elif end.get("flooded"):
            status = "output-limit"
        elif code == 137:
            status = "out-of-memory"
        out, err = buffers[channel.STDOUT], buffers[channel.STDERR]
        return ExecResult(
            command=request.argv,
            returncode=code,
            status=status,
            stdout=bytes(out.head),
            stderr=bytes(err.head),
            stdout_bytes=out.num_bytes,
            stderr_bytes=err.num_bytes,
            stdout_file=out.file,
            stderr_file=err.file,
            wall_s=loop.time() - started,
            cpu_s=end.get("cpu_s") or 0.0,
        )

    async def _converse(
        self, worker: Worker, call: dict[str, Any], buffers: dict[bytes, OutputBuffer]
    ) -> dict[str, Any]:
        await worker.send(channel.CALL, call)
        while True:
            kind, data = await worker.receive()
            if kind == channel.EXIT:
                end: dict[str, Any] = json.loads(data)
                return end
            if kind == channel.TOOL:
                asked = json.loads(data)
                await worker.send(channel.TOOL_RESULT, await self._use_tool(**asked))
            else:
                buffers[kind].write(data)
                if buffers[kind].full:
                    return {"code": 137, "flooded": True}

    async def _use_tool(self, name: str, arguments: list[Any]) -> dict[str, Any]:
        tool = self.tools.get(name)
        if tool is None:
            return {"error": f"no tool is called {name!r}"}
        try:
            value = tool(*arguments)
            if inspect.isawaitable(value):
                value = await value
            json.dumps(value)
        except Exception as error:  # a tool's failure is the script's to handle
            return {"error": f"{type(error).__name__}: {error}"}
        return {"value": value}

    async def _discard(self, engine: Engine) -> None:
        worker = self._workers.pop(engine, None)
        if worker is not None:
            await worker.stop()

    # -- files: only the host writes them, so that no link in them can lead anywhere
    def _host_path(self, path: str) -> Path:
        parts = PurePosixPath(path).parts
        if parts[:2] == ("/", "data"):
            parts = ("/", *parts[2:])
        if not parts or parts[0] != "/" or ".." in parts:
            raise SandboxRequestError(f"path {path!r} is not absolute, or holds '..'")
        return self._files.joinpath(*parts[1:])

    async def read(self, path: str, *, user: str | None = None) -> bytes:
        try:
            return self._host_path(path).read_bytes()
        except OSError as error:
            raise SandboxRequestError(
                f"read {path!r}: {error.strerror}", errno=error.errno
            ) from None

    async def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, user: str | None = None
    ) -> None:
        content = data.encode() if isinstance(data, str) else data
        target = self._host_path(path)
        held = sum(file.stat().st_size for file in self._files.rglob("*") if file.is_file())
        if held + len(content) > self.options.limits.disk_bytes:
            raise SandboxRequestError(f"write {path!r}: over limits.disk_bytes")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(mode)
        except OSError as error:
            raise SandboxRequestError(
                f"write {path!r}: {error.strerror}", errno=error.errno
            ) from None

    async def list(self, path: str) -> list[Entry]:
        target = self._host_path(path)
        if not target.exists():
            raise SandboxRequestError(f"list {path!r}: no such file or directory", errno=2)
        if target.is_file():
            return [_entry("", target)]
        return [_entry(child.name, child) for child in sorted(target.iterdir())]

    async def mkdir(self, path: str) -> None:
        self._host_path(path).mkdir(parents=True, exist_ok=True)

    async def remove(self, path: str) -> None:
        target = self._host_path(path)
        if not target.exists():
            raise SandboxRequestError(f"remove {path!r}: no such file or directory", errno=2)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    @property
    def is_alive(self) -> bool:
        return not self._ended

    async def kill(self) -> None:
        self._ended = True
        for engine in list(self._workers):
            await self._discard(engine)
        if self._containers is not None:
            await self._containers.close()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def _entry(name: str, path: Path) -> Entry:
    status = path.stat()
    return Entry(
        name=name,
        kind="directory" if path.is_dir() else "file",
        size_bytes=status.st_size,
        mode=status.st_mode & 0o7777,
        modified_s=status.st_mtime,
    )


class FunctionCall:
    """A call as a `RunningCommand`: it runs when its result or output is asked for."""

    def __init__(
        self,
        sandbox: FunctionSandbox,
        request: ExecRequest,
        engine: Engine,
        source: str,
        arguments: list[str],
    ) -> None:
        self._task = asyncio.get_running_loop().create_task(
            sandbox.run(request, engine, source, arguments)
        )

    async def __aiter__(self) -> AsyncIterator[Output]:
        result = await self.result()
        streams: tuple[tuple[Channel, bytes, Path | None], ...] = (
            ("stdout", result.stdout, result.stdout_file),
            ("stderr", result.stderr, result.stderr_file),
        )
        for name, kept, file in streams:
            if file is None:
                if kept:
                    yield Output(name, kept)
                continue
            with file.open("rb") as whole:
                while piece := whole.read(1 << 20):
                    yield Output(name, piece)

    async def write(self, data: bytes) -> None:
        raise UnsupportedError("a function's stdin is given with the call")

    def close_stdin(self) -> None:
        """Nothing to close: stdin was given with the call."""

    def send_signal(self, number: int) -> None:
        raise UnsupportedError("a function takes no signals")

    def resize(self, rows: int, columns: int) -> None:
        raise UnsupportedError("a function has no terminal")

    def kill(self) -> None:
        self._task.cancel()

    async def result(self) -> ExecResult:
        return await asyncio.shield(self._task)
