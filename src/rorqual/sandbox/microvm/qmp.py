"""QEMU's control socket: one command at a time, its answer, and file descriptors handed over.

Events are read and dropped; who waits for a state asks for it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

from rorqual.errors import SandboxFailedError, SandboxLostError

MAX_LINE_BYTES = 1 << 20
POLL_S = 0.002


class Qmp:
    """A connection over a connected, non-blocking stream socket; owns it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Greet; QEMU accepts commands afterwards."""
        async with self._lock:
            greeting = await self._read()
        if "QMP" not in greeting:
            raise SandboxFailedError("QEMU did not greet")
        await self.execute("qmp_capabilities")

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """Run a command and return its answer.

        Args:
            fd: a descriptor passed along, for `getfd` and `add-fd`.

        Raises:
            SandboxFailedError: QEMU refused it.
            SandboxLostError: QEMU is gone.
        """
        data = json.dumps({"execute": command, "arguments": dict(arguments or {})}).encode() + b"\n"
        async with self._lock:
            await self._send(data, fd)
            while True:
                message = await self._read()
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise SandboxFailedError(f"QEMU: {command}: {message['error'].get('desc')}")

    async def hmp(self, line: str) -> None:
        """Run a line of the human monitor, for what has no other command; its words are errors."""
        said = await self.execute("human-monitor-command", {"command-line": line})
        if said.strip():
            raise SandboxFailedError(f"QEMU: {line}: {said.strip()}")

    async def wait_status(self, *wanted: str) -> None:
        """Wait until the machine is in one of these states."""
        while (await self.execute("query-status"))["status"] not in wanted:
            await asyncio.sleep(POLL_S)

    async def wait_migrated(self) -> None:
        """Wait for the end of `migrate`; raises `SandboxFailedError` if it failed."""
        while True:
            told = await self.execute("query-migrate")
            if told.get("status") == "completed":
                return
            if told.get("status") in ("failed", "cancelled"):
                why = told.get("error-desc", told["status"])
                raise SandboxFailedError(f"the machine's state could not be saved: {why}")
            await asyncio.sleep(POLL_S)

    async def _send(self, data: bytes, fd: int | None) -> None:
        try:
            if fd is None:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            elif socket.send_fds(self._sock, [data], [fd]) != len(data):  # far below any buffer
                raise SandboxFailedError("QEMU does not read its commands")
        except OSError as error:
            raise SandboxLostError(f"QEMU is gone: {error}") from None

    async def _read(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                piece = await loop.sock_recv(self._sock, 65536)
            except OSError:
                piece = b""
            if not piece:
                raise SandboxLostError("QEMU is gone")
            self._buffer += piece
            if len(self._buffer) > MAX_LINE_BYTES:
                raise SandboxFailedError("QEMU's answer has no end")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close the connection; QEMU goes on."""
        self._sock.close()
