"""The one class behind every substrate: create, run commands, move files, snapshot, fork, kill.

`Sandbox.create` picks the substrate. Everything is asynchronous; `sync.py` has the same without
`await`. What goes wrong is kept apart: a command's bad end is data (`ExecResult`), the caller's
mistake `SandboxRequestError`, policy `SandboxRefusedError`, the operator's `SandboxFailedError`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from rorqual.errors import SandboxRequestError, UnsupportedError
from rorqual.sandbox.client import Output
from rorqual.sandbox.contract import (
    Capabilities,
    Entry,
    ExecRequest,
    ExecResult,
    Limits,
    Network,
    SubstrateName,
    as_argv,
)

MAX_READ_BYTES = 256 << 20
"""Largest file `read` and `download` hold in memory."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state a sandbox can be created from: `Sandbox.create(snapshot=...)`.

    Attributes:
        id: content-derived where the substrate stores layers.
        kind: "files", or "memory" if running processes are part of it.
    """

    id: str
    substrate: SubstrateName
    kind: Literal["files", "memory"]


@dataclass(frozen=True, kw_only=True)
class SandboxOptions:
    """Everything `Sandbox.create` was asked for.

    Attributes:
        image: what its file system starts from: an image's name, a directory, "host" (the host's
            /usr, read-only, and an empty rest), or None for the substrate's default.
        isolation: a stronger variant of a substrate, such as "gvisor" for containers.
        ttl_s: seconds after which it is killed, whatever happens.
        linger_s: seconds it outlives a lost creator; 0 ends it at once.
        read_only: refuse writes outside /tmp, /run and /workspace.
    """

    substrate: SubstrateName = "container"
    image: str | Path | None = None
    isolation: str | None = None
    limits: Limits = field(default_factory=Limits)
    network: Network | None = None
    ttl_s: float | None = None
    linger_s: float = 0.0
    env: Mapping[str, str] = field(default_factory=dict)
    read_only: bool = False
    snapshot: Snapshot | None = None
    root: Path | None = None

    def __post_init__(self) -> None:
        for name in ("ttl_s", "linger_s"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < 1e9):
                raise SandboxRequestError(f"{name} is {value!r}; it must be >= 0")
        if self.snapshot is not None and self.image is not None:
            raise SandboxRequestError("give an image or a snapshot, not both")
        if self.snapshot is not None and self.snapshot.substrate != self.substrate:
            raise SandboxRequestError(
                f"the snapshot is of substrate {self.snapshot.substrate!r}, not {self.substrate!r}"
            )


class RunningCommand(Protocol):
    """A command that runs: iterate it for its output, then ask for its `result`."""

    def __aiter__(self) -> AsyncIterator[Output]: ...

    async def write(self, data: bytes) -> None:
        """Give it bytes on stdin."""

    def close_stdin(self) -> None:
        """Tell it that no more input comes."""

    def send_signal(self, number: int) -> None:
        """Signal its process group."""

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""

    def kill(self) -> None:
        """Kill it and everything it started."""

    async def result(self) -> ExecResult:
        """Wait for its end; output nobody iterated over is in the result."""


@dataclass(frozen=True)
class Endpoint:
    """A port of a sandbox, reachable from this machine until the sandbox ends."""

    host: str
    port: int


class Sandbox(ABC):
    """One sandbox. Use it as a context manager, or `kill` it.

    Attributes:
        notes: what works here, but less well than it could, and how to have it better.
    """

    id: str
    options: SandboxOptions
    capabilities: Capabilities
    notes: tuple[str, ...] = ()

    @staticmethod
    async def create(
        substrate: SubstrateName = "container",
        *,
        files: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> Sandbox:
        """Start a sandbox.

        Args:
            files: absolute path inside -> contents, written before it is returned.
            options: fields of `SandboxOptions`.

        Raises:
            SandboxRequestError: an option is wrong.
            SubstrateMissingError: this machine lacks what the substrate needs.
            SandboxFailedError: it could not be started.
        """
        known = set(SandboxOptions.__dataclass_fields__) - {"substrate"}
        if unknown := sorted(set(options) - known):
            raise SandboxRequestError(f"unknown option {unknown[0]!r}; known: {sorted(known)}")
        sandbox = await start_sandbox(SandboxOptions(substrate=substrate, **options))
        try:
            for path, data in (files or {}).items():
                await sandbox.write(path, data)
        except BaseException:
            await sandbox.kill()
            raise
        return sandbox

    # -- commands
    def request(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | str | None = b"",
        timeout_s: float | None = None,
        cwd: str | None = None,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        pty: tuple[int, int] | None = None,
        exec_id: str | None = None,
    ) -> ExecRequest:
        """Validate one command against this sandbox; the arguments are those of `exec`."""
        if user is not None and not self.capabilities.users:
            raise UnsupportedError(f"{self.options.substrate}: commands cannot choose a user")
        if pty is not None and not self.capabilities.pty:
            raise UnsupportedError(f"{self.options.substrate}: there are no terminals")
        return ExecRequest(
            argv=as_argv(command),
            stdin=stdin.encode() if isinstance(stdin, str) else stdin,
            env={**self.options.env, **(env or {})},
            cwd=cwd,
            user=user,
            timeout_s=self.options.limits.exec_s if timeout_s is None else timeout_s,
            merge=merge,
            pty=pty,
            exec_id=exec_id,
        )

    async def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:
        """Run a command to its end.

        Args:
            command: a shell line, or program and arguments.
            options: stdin, timeout_s (then the whole process tree is killed), cwd, user, env, and
                merge (stderr into stdout).
        """
        running = await self.dispatch(self.request(command, **options), keep_output=True)
        return await running.result()

    async def start(self, command: str | Sequence[str], **options: Any) -> RunningCommand:
        """Start a command and stream its output; `stdin=None` keeps its stdin open."""
        return await self.dispatch(self.request(command, **options), keep_output=False)

    async def pty(
        self,
        command: str | Sequence[str] = ("/bin/sh", "-i"),
        *,
        rows: int = 24,
        columns: int = 80,
        **options: Any,
    ) -> RunningCommand:
        """Start a command on a terminal of its own."""
        options = {"stdin": None, "env": {"TERM": "xterm-256color"}, **options}
        request = self.request(command, pty=(rows, columns), merge=True, **options)
        return await self.dispatch(request, keep_output=False)

    @abstractmethod
    async def dispatch(self, request: ExecRequest, *, keep_output: bool) -> RunningCommand:
        """Start a validated command."""

    # -- files
    @abstractmethod
    async def read(self, path: str, *, user: str | None = None) -> bytes:
        """Contents of a regular file."""

    @abstractmethod
    async def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, user: str | None = None
    ) -> None:
        """Write a file, making its parent directories."""

    @abstractmethod
    async def list(self, path: str) -> list[Entry]:
        """The names in a directory, or the one entry (with an empty name) of a file."""

    @abstractmethod
    async def mkdir(self, path: str) -> None:
        """Make a directory and its parents."""

    @abstractmethod
    async def remove(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it."""

    async def upload(self, local: Path | str, path: str) -> None:
        """Copy a file or a directory into the sandbox; links inside it stay links' targets' copies.

        A link that leads out of the uploaded directory is refused.
        """
        from rorqual.sandbox.transfer import upload

        await upload(self, Path(local), path)

    async def download(self, path: str, local: Path | str) -> None:
        """Copy a file or a directory out of the sandbox.

        Links are not followed and not made: what the sandbox holds is data, and a link could lead
        anywhere on this machine.
        """
        from rorqual.sandbox.transfer import download

        await download(self, path, Path(local))

    # -- state
    async def snapshot(self) -> Snapshot:
        """Keep the present state; the sandbox goes on."""
        raise UnsupportedError(f"{self.options.substrate}: there are no snapshots")

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        """New sandboxes that start from this one's present state."""
        if count < 1:
            raise SandboxRequestError(f"count is {count}; it must be >= 1")
        snapshot = await self.snapshot()
        options = replace(self.options, snapshot=snapshot, image=None)
        forks: list[Sandbox] = []
        try:
            for _ in range(count):
                forks.append(await start_sandbox(options))
        except BaseException:
            for sandbox in forks:
                await sandbox.kill()
            raise
        return forks

    async def pause(self) -> None:
        """Stop all of it from running; nothing is lost."""
        raise UnsupportedError(f"{self.options.substrate}: it cannot be paused")

    async def resume(self) -> None:
        """Go on after `pause`."""
        raise UnsupportedError(f"{self.options.substrate}: it cannot be paused")

    async def expose(self, port: int) -> Endpoint:
        """Make a TCP port of the sandbox's loopback reachable on this machine's loopback."""
        raise UnsupportedError(f"{self.options.substrate}: it has no ports")

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it has not ended, as far as is known here."""

    @abstractmethod
    async def kill(self) -> None:
        """End it and remove everything of it; does nothing the second time."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.kill()


async def start_sandbox(options: SandboxOptions) -> Sandbox:
    """Start what `options` describe. The one place that knows the substrates."""
    match options.substrate:
        case "container":
            from rorqual.sandbox.container.start import start_container

            return await start_container(options)
        case "function":
            from rorqual.sandbox.function.sandbox import FunctionSandbox

            return await FunctionSandbox.open(options)
        case "microvm":
            from rorqual.sandbox.microvm.sandbox import start_microvm

            return await start_microvm(options)
        case "vm":
            from rorqual.sandbox.vm.sandbox import start_vm

            return await start_vm(options)
        case _:
            raise SandboxRequestError(
                f"substrate {options.substrate!r} is not one of function, container, microvm, vm"
            )
