"""A sandbox with an agent inside: everything of the contract that only needs the agent.

Containers and guest machines derive from it and add how they start, pause, snapshot and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox import wire
from rorqual.sandbox.client import AgentClient, Channel, Output, Process, stage_error
from rorqual.sandbox.contract import (
    Capabilities,
    Entry,
    ExecRequest,
    ExecResult,
    ExecStatus,
    Limits,
    Network,
)
from rorqual.sandbox.output import OutputBuffer
from rorqual.sandbox.proxy import PROXY_PORT, EgressProxy, serve_port
from rorqual.sandbox.sandbox import MAX_READ_BYTES, Endpoint, Sandbox, SandboxOptions

BACKSTOP_S = 10.0
"""How much longer than its timeout a command may take before the agent itself is given up."""

MAX_LISTING_BYTES = 64 << 20


class AgentCommand:
    """A command of an `AgentSandbox`; see `RunningCommand`."""

    def __init__(self, sandbox: AgentSandbox, request: ExecRequest, *, keep_output: bool) -> None:
        self.request = request
        self._sandbox = sandbox
        self._keep_output = keep_output
        self._buffers = {
            channel: sandbox.output_buffer(request, channel) for channel in ("stdout", "stderr")
        }
        self._flooded = False
        self.process: Process | None = None

    @property
    def _running(self) -> Process:
        assert self.process is not None, "not dispatched"
        return self.process

    @property
    def received(self) -> tuple[int, int]:
        """Bytes of stdout and stderr that are held."""
        return self._buffers["stdout"].num_bytes, self._buffers["stderr"].num_bytes

    def take(self, channel: Channel, data: bytes) -> None:
        """Store a piece of output; kills the command at the limit."""
        buffer = self._buffers[channel]
        buffer.write(data)
        if buffer.full and not self._flooded:
            self._flooded = True
            self._running.kill()

    def __aiter__(self) -> AsyncIterator[Output]:
        if self._keep_output:
            raise SandboxRequestError("the output of this command is collected for its result")
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Output]:
        async for piece in self._running:
            yield piece

    async def write(self, data: bytes) -> None:
        await self._running.write(data)

    def close_stdin(self) -> None:
        self._running.close_stdin()

    def send_signal(self, number: int) -> None:
        self._running.send_signal(number)

    def resize(self, rows: int, columns: int) -> None:
        self._running.resize(rows, columns)

    def kill(self) -> None:
        self._running.kill()

    async def result(self) -> ExecResult:
        try:
            # The agent keeps the time; this only catches an agent that no longer does.
            async with asyncio.timeout(self.request.timeout_s + BACKSTOP_S):
                if not self._keep_output:
                    async for piece in self._running:
                        self.take(piece.channel, piece.data)
                exit = await self._running.wait()
        except TimeoutError:
            await self._sandbox.kill()
            raise SandboxFailedError(
                f"the agent did not end a command {BACKSTOP_S:g} s after its timeout; "
                "the sandbox was killed"
            ) from None
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            for buffer in self._buffers.values():
                buffer.close()
        return self._as_result(exit)

    def _as_result(self, exit: wire.Exit) -> ExecResult:
        stdout, stderr = self._buffers["stdout"], self._buffers["stderr"]
        status: ExecStatus = exit.status
        code = exit.code
        if status == "not-started":
            if exit.stage != "x":
                raise stage_error(exit, self.request)
            code = 127 if exit.error == errno.ENOENT else 126
            stderr.write(f"{self.request.argv[0]}: {os.strerror(exit.error)}\n".encode())
        elif self._flooded:
            status = "output-limit"
        elif code == 137 and status == "signalled" and self._sandbox.ran_out_of_memory():
            status = "out-of-memory"
        return ExecResult(
            command=self.request.argv,
            returncode=code,
            status=status,
            stdout=bytes(stdout.head),
            stderr=bytes(stderr.head),
            stdout_bytes=stdout.num_bytes,
            stderr_bytes=stderr.num_bytes,
            stdout_file=stdout.file,
            stderr_file=stderr.file,
            wall_s=exit.wall_s,
            cpu_s=exit.cpu_s,
            max_rss_bytes=exit.max_rss_bytes,
        )


class AgentSandbox(Sandbox):
    """Base of substrates with an agent inside.

    Args:
        client: the connection to the agent.
        directory: where this sandbox's host-side files (spilled output) live.
        confine: drop capabilities and filter system calls of every command.
    """

    def __init__(
        self,
        *,
        id: str,
        options: SandboxOptions,
        capabilities: Capabilities,
        client: AgentClient,
        directory: Path,
        confine: bool,
    ) -> None:
        self.id = id
        self.options = options
        self.capabilities = capabilities
        self.client = client
        self.directory = directory
        self._confine = confine
        self._numbers = itertools.count(1)
        self._servers: list[asyncio.Server] = []
        self.proxy: EgressProxy | None = None
        self.relays: list[EgressProxy] = []

    @property
    def limits(self) -> Limits:
        """The limits it was created with."""
        return self.options.limits

    @property
    def boot_id(self) -> str:
        """Changes when the agent was started anew: its journal is then empty."""
        return self.client.boot_id

    @property
    def is_alive(self) -> bool:
        return self.client.is_open

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed for want of memory since this was last asked."""
        return False

    async def change_digest(self) -> str | None:
        """Digest of everything written since the sandbox was created; None if not known."""
        return None

    async def open_network(self) -> None:
        """Start the egress proxy if the options allow any destination.

        Raises:
            UnsupportedError: direct routes need a namespace of this kernel's.
        """
        if self.options.network is not None and self.options.network.direct:
            await self.open_routes(self.options.network)
        if self.options.network is not None and self.options.network.allow:
            self.proxy = EgressProxy(self.client, self.options.network)
            await self.proxy.start()

    async def open_routes(self, network: Network) -> None:
        """Make `network.direct` reachable."""
        raise UnsupportedError(f"{self.options.substrate}: there are no direct routes, only names")

    # -- commands
    def output_buffer(self, request: ExecRequest, channel: Channel) -> OutputBuffer:
        """Where one stream of a command goes; logged commands keep theirs across a crash."""
        name = request.exec_id or f"exec-{next(self._numbers)}"
        return OutputBuffer(
            self.directory / "output" / f"{name}.{channel}",
            keep_bytes=self.limits.output_bytes,
            limit_bytes=self.limits.spill_bytes,
            durable=request.exec_id is not None,
        )

    def request(self, command: str | Sequence[str], **options: Any) -> ExecRequest:
        request = super().request(command, **options)
        if self.options.network is None or not self.options.network.allow:
            return request
        url = f"http://127.0.0.1:{PROXY_PORT}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), url)
        return dataclasses.replace(request, env={**proxies, **request.env})

    async def dispatch(self, request: ExecRequest, *, keep_output: bool) -> AgentCommand:
        self.ran_out_of_memory()
        command = AgentCommand(self, request, keep_output=keep_output)
        # The sink is bound before the process exists; output cannot come before `start` returns.
        command.process = await self.client.start(
            request, sink=command.take if keep_output else None, confine=self._confine
        )
        return command

    async def attach_command(self, request: ExecRequest) -> AgentCommand | None:
        """Take over a dispatched command by `request.exec_id`; None if it was never dispatched."""
        command = AgentCommand(self, request, keep_output=True)
        command.process = await self.client.attach(
            request, have=command.received, sink=command.take
        )
        return command if command.process is not None else None

    # -- files
    async def _builtin(
        self,
        name: str,
        *arguments: str,
        stdin: bytes = b"",
        user: str | None = None,
        limit: int = 0,
    ) -> bytes:
        if not arguments[0].startswith("/"):
            raise SandboxRequestError(f"path {arguments[0]!r} is not absolute")
        code, output = await self.client.run_builtin(
            name, *arguments, stdin=stdin, user=user, limit=limit
        )
        if code == 0:
            return output
        error = f"{name} {arguments[0]!r}: {os.strerror(code)}"
        if code in (errno.EIO, errno.ENOMEM, errno.ENOSYS):
            raise SandboxFailedError(error)
        raise SandboxRequestError(error, errno=code)

    async def read(self, path: str, *, user: str | None = None) -> bytes:
        return await self._builtin("read", path, user=user, limit=MAX_READ_BYTES)

    async def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, user: str | None = None
    ) -> None:
        content = data.encode() if isinstance(data, str) else data
        await self._builtin("write", path, f"{mode & 0o7777:o}", "w", stdin=content, user=user)

    async def list(self, path: str) -> list[Entry]:
        return wire.decode_entries(await self._builtin("list", path, limit=MAX_LISTING_BYTES))

    async def mkdir(self, path: str) -> None:
        await self._builtin("mkdir", path)

    async def remove(self, path: str) -> None:
        await self._builtin("remove", path)

    # -- ports
    async def expose(self, port: int) -> Endpoint:
        if not self.capabilities.expose:
            raise UnsupportedError(f"{self.options.substrate}: it has no ports")
        if not 0 < port < 65536:
            raise SandboxRequestError(f"port is {port}; it must be 1 to 65535")
        server = await serve_port(self.client, port)
        self._servers.append(server)
        host, bound = server.sockets[0].getsockname()[:2]
        return Endpoint(host, bound)

    # -- end
    @abstractmethod
    async def destroy(self) -> None:
        """Remove everything on the host; the agent's connection is still there or already lost."""

    async def kill(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self.proxy is not None:
            await self.proxy.stop()
            self.proxy = None
        for relay in self.relays:
            await relay.stop()
        self.relays.clear()
        await self.destroy()
        self.client.close()
        with contextlib.suppress(SandboxLostError):
            await self.client.closed
