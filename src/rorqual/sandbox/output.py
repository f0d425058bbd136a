"""Where a command's output goes: the beginning to memory, everything to a file once it is more."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO


class OutputBuffer:
    """One stream of one command.

    Args:
        path: file for the whole stream; created when the stream outgrows memory. With `durable`
            it is written at once, and one that exists is continued.
        keep_bytes: how much stays in memory.
        limit_bytes: how much is taken at all; `full` turns true beyond it.
    """

    def __init__(
        self, path: Path, *, keep_bytes: int, limit_bytes: int, durable: bool = False
    ) -> None:
        self.path = path
        self.head = bytearray()
        self.num_bytes = 0
        self.full = False
        self._keep_bytes = keep_bytes
        self._limit_bytes = max(limit_bytes, keep_bytes)
        self._file: BinaryIO | None = None
        if durable and path.exists():  # a connection was lost: go on where the file ends
            self._file = path.open("ab", buffering=0)
            self.num_bytes = path.stat().st_size
            with path.open("rb") as written:
                self.head += written.read(keep_bytes)
        elif durable:
            self._open()

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = self.path.open("wb", buffering=0)
        return self._file

    @property
    def file(self) -> Path | None:
        """The file with the whole stream, if there is one."""
        return self.path if self._file is not None else None

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        room = self._limit_bytes - self.num_bytes
        if len(data) > room:
            data = data[:room]
            self.full = True
        if self._file is None and self.num_bytes + len(data) > self._keep_bytes:
            self._open().write(self.head)
        if self._file is not None:
            self._file.write(data)
        self.num_bytes += len(data)
        self.head += data[: self._keep_bytes - len(self.head)]

    def close(self) -> None:
        """Close the file; it stays on disk."""
        if self._file is not None:
            self._file.close()
