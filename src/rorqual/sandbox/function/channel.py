"""Messages between a function sandbox and its worker: u32 size, u8 kind, payload."""

from __future__ import annotations

import struct
from typing import BinaryIO

HEAD = struct.Struct("<Ic")
MAX_MESSAGE_BYTES = 64 << 20

CALL, TOOL_RESULT = b"C", b"t"
"""From the host, JSON."""

READY, STDOUT, STDERR, TOOL, EXIT = b"R", b"O", b"E", b"T", b"X"
"""From the worker: output is bytes, the others JSON."""


def pack(kind: bytes, payload: bytes) -> bytes:
    """One message."""
    return HEAD.pack(len(payload), kind) + payload


def read_message(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """The next message of a blocking stream, or None at its end."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    size, kind = HEAD.unpack(head)
    return kind, stream.read(size)
