"""A guest's serial console, read and bounded: why it failed, what was killed."""

from __future__ import annotations

import asyncio
import socket

KEEP_BYTES = 16 * 1024
_OUT_OF_MEMORY = b"Out of memory: Killed process"


class Console:
    """Reads what the guest's kernel says; owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._tail = bytearray()
        self._line = bytearray()
        self._kills = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self.read)

    def read(self) -> None:
        """Take what is there now."""
        while True:
            try:
                data = self._sock.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._sock)
                return
            self._tail = (self._tail + data)[-KEEP_BYTES:]
            self._line += data
            *lines, rest = self._line.split(b"\n")
            self._line = bytearray(rest[-200:])
            self._kills += sum(_OUT_OF_MEMORY in line for line in lines)

    def new_kills(self) -> int:
        """How often the guest's kernel killed for want of memory since the last call."""
        if self._sock.fileno() >= 0:
            self.read()
        kills, self._kills = self._kills, 0
        return kills

    @property
    def text(self) -> str:
        """The end of what was said."""
        return self._tail.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Stop reading."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
