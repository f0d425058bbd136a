"""The agent's wire format: encoding and decoding, without any input or output.

A frame is u32 payload size, u8 type, u32 stream, payload, little endian. The other side and the
meaning of the fields are in native/agent.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from rorqual.errors import SandboxFailedError
from rorqual.sandbox.contract import Entry, EntryKind, ExecRequest, ExecStatus

HEAD = struct.Struct("<IcI")
EXIT = struct.Struct("<iiic2Q4Q")
ENTRY = struct.Struct("<cIQqH")

WINDOW_BYTES = 1 << 20
"""Unacknowledged bytes either side may have under way on one stream."""

CHUNK_BYTES = 1 << 16
MAX_FRAME_BYTES = 4 << 20
MAX_REQUEST_BYTES = 2 << 20
"""Arguments and variables of one command; Linux itself stops near 2 MiB."""

VERSION = 1


class Flag(IntFlag):
    """Options of a command."""

    PTY = 1
    KEEP = 2
    CONFINE = 4
    MERGE = 8


class Frame(NamedTuple):
    """One message."""

    type: bytes
    stream: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a command ended, as the agent reports it."""

    code: int
    status: ExecStatus
    error: int
    stage: str
    stdout_bytes: int
    stderr_bytes: int
    cpu_s: float
    max_rss_bytes: int
    wall_s: float


_REASONS: tuple[ExecStatus, ...] = ("exited", "signalled", "timed-out", "killed", "not-started")
_KINDS: dict[bytes, EntryKind] = {b"f": "file", b"d": "directory", b"l": "link", b"o": "other"}


def encode(type: bytes, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEAD.pack(len(payload), type, stream) + payload


class Decoder:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes; raises `SandboxFailedError` on nonsense."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= HEAD.size:
            size, type, stream = HEAD.unpack_from(self._buffer, at)
            if size > MAX_FRAME_BYTES:
                raise SandboxFailedError(f"the agent sent a frame of {size} bytes")
            end = at + HEAD.size + size
            if len(self._buffer) < end:
                break
            yield Frame(type, stream, bytes(self._buffer[at + HEAD.size : end]))
            at = end
        del self._buffer[:at]


def text_field(tag: bytes, text: str) -> bytes:
    """A field holding a C string."""
    data = text.encode("utf-8", "surrogateescape") + b"\0"
    return tag + len(data).to_bytes(4, "little") + data


def number_field(tag: bytes, number: int) -> bytes:
    """A field holding a u64."""
    return tag + (8).to_bytes(4, "little") + number.to_bytes(8, "little")


def encode_exec(request: ExecRequest, *, confine: bool = True, builtin: str | None = None) -> bytes:
    """Payload of a request to run `request.argv`, or a built-in with `request.argv` after it."""
    flags = Flag(0)
    if confine:
        flags |= Flag.CONFINE
    if request.merge:
        flags |= Flag.MERGE
    fields = []
    if request.exec_id is not None:
        flags |= Flag.KEEP
        fields.append(text_field(b"I", request.exec_id))
    if request.pty is not None:
        flags |= Flag.PTY
        rows, columns = request.pty
        fields.append(number_field(b"z", rows << 16 | columns))
    if builtin is not None:
        fields.append(text_field(b"B", builtin))
    fields += [text_field(b"A", word) for word in request.argv]
    fields += [text_field(b"V", f"{name}={value}") for name, value in request.env.items()]
    if request.cwd is not None:
        fields.append(text_field(b"W", request.cwd))
    if request.user is not None:
        fields.append(text_field(b"U", request.user))
    fields.append(number_field(b"t", max(1, round(request.timeout_s * 1000))))
    fields.append(number_field(b"f", flags))
    return b"".join(fields)


def decode_exit(payload: bytes) -> Exit:
    """An exit frame."""
    code, reason, error, stage, out, err, user, system, rss, wall = EXIT.unpack(payload)
    status = _REASONS[reason]
    if status in ("signalled", "timed-out", "killed") and 0 < code < 128:
        code += 128
    return Exit(
        code=code,
        status=status,
        error=error,
        stage=stage.decode("ascii", "replace"),
        stdout_bytes=out,
        stderr_bytes=err,
        cpu_s=(user + system) / 1e6,
        max_rss_bytes=rss * 1024,
        wall_s=wall / 1e3,
    )


def decode_entries(data: bytes) -> list[Entry]:
    """A directory listing, sorted by name."""
    entries = []
    at = 0
    while at < len(data):
        kind, mode, size, mtime, name_size = ENTRY.unpack_from(data, at)
        at += ENTRY.size
        name = data[at : at + name_size].decode("utf-8", "surrogateescape")
        at += name_size
        target_size = int.from_bytes(data[at : at + 2], "little")
        target = data[at + 2 : at + 2 + target_size].decode("utf-8", "surrogateescape")
        at += 2 + target_size
        entries.append(
            Entry(
                name=name,
                kind=_KINDS[kind],
                size_bytes=size,
                mode=mode,
                modified_s=mtime / 1e9,
                target=target or None,
            )
        )
    return sorted(entries, key=lambda entry: entry.name)
