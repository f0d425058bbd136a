"""One segment of the cache on disk: a data file of equal payloads, and an index that names them.

``NAME.data`` is payload after payload. ``NAME.index`` is a header and, for the payload in slot i,
record i: key, parent key, checksums. A payload is written and synced before its record, records are
checksummed with their slot number, and a file is only ever appended to by the process that made it.
So whatever a crash or a bad disk leaves behind, a record that checks out names a payload that was
complete, a payload that checks out is the one that was written, and damage costs the records it
touched, no others. While its maker lives it holds a lock on the index.

Payloads are read with ``pread``, not mapped: a file cut short under a mapping kills the process.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

FORMAT_VERSION = 1
Kind = Literal["block", "checkpoint"]
KINDS: tuple[Kind, ...] = ("block", "checkpoint")

_MAGIC = b"RORQUALC"
_HEADER = struct.Struct("<8sIIQ16s")  # magic, version, kind, payload bytes, identity
_RECORD = struct.Struct("<16s16sI")  # key, parent, checksum of the payload
_SUM = struct.Struct("<I")
HEADER_NBYTES = _HEADER.size + _SUM.size
RECORD_NBYTES = _RECORD.size + _SUM.size


class Record(NamedTuple):
    """One payload's entry in the index."""

    slot: int
    key: bytes
    parent: bytes
    checksum: int


class Payload(NamedTuple):
    """One thing to write. Keys have 16 bytes."""

    key: bytes
    parent: bytes
    data: bytes


class SegmentWriter:
    """Makes a new segment and appends to it. The caller holds the directory's lock meanwhile."""

    def __init__(self, directory: Path, kind: Kind, payload_nbytes: int, identity: bytes) -> None:
        self.name = f"{time.time_ns():016x}-{secrets.token_hex(4)}"
        self.num_slots = 0
        self._payload_nbytes = payload_nbytes
        index, data = paths(directory, self.name)
        self._index: IO[bytes] = open(index, "xb", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data: IO[bytes] = open(data, "xb", buffering=0)  # noqa: SIM115
            _write(self._index, _header(kind, payload_nbytes, identity))
        except BaseException:
            self._index.close()
            raise

    def append(self, payloads: Sequence[Payload]) -> list[Record]:
        """Write payloads; when this returns they survive a loss of power.

        Raises OSError, after which the segment takes no more but what it had stays good.
        """
        records: list[Record] = []
        for payload in payloads:
            assert len(payload.data) == self._payload_nbytes
            _write(self._data, payload.data)
            slot = self.num_slots + len(records)
            records.append(Record(slot, payload.key, payload.parent, zlib.crc32(payload.data)))
        os.fdatasync(self._data.fileno())
        _write(self._index, b"".join(map(_pack, records)))
        os.fdatasync(self._index.fileno())
        self.num_slots += len(records)
        return records

    def close(self) -> None:
        """Let go of the files; the lock goes with them."""
        self._data.close()
        self._index.close()


def paths(directory: Path, name: str) -> tuple[Path, Path]:
    """Index file and data file of a segment."""
    return directory / f"{name}.index", directory / f"{name}.data"


def read_kind(index: Path, payload_nbytes: dict[Kind, int], identity: bytes) -> Kind | None:
    """What a segment holds; None if the header is damaged or not of this model and layout."""
    with index.open("rb") as file:
        header = file.read(HEADER_NBYTES)
    for kind in KINDS:
        if header == _header(kind, payload_nbytes[kind], identity):
            return kind
    return None


def read_records(index: Path, first_slot: int) -> tuple[list[Record], int]:
    """Records from ``first_slot`` on that check out, and the number of slots there are now."""
    with index.open("rb") as file:
        file.seek(HEADER_NBYTES + first_slot * RECORD_NBYTES)
        data = file.read()
    count = len(data) // RECORD_NBYTES  # a record being written is left for the next time
    records: list[Record] = []
    for i in range(count):
        raw = data[i * RECORD_NBYTES : (i + 1) * RECORD_NBYTES]
        record = Record(first_slot + i, *_RECORD.unpack_from(raw))
        if _pack(record) == raw:
            records.append(record)
    return records, first_slot + count


def read_payload(data: Path, record: Record, payload_nbytes: int) -> bytes | None:
    """The payload, None if it does not check out.

    Raises OSError if the file is gone.
    """
    file = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.pread(file, payload_nbytes, record.slot * payload_nbytes)
    finally:
        os.close(file)
    if len(found) != payload_nbytes or zlib.crc32(found) != record.checksum:
        return None
    return found


def is_being_written(index: Path) -> bool:
    """Whether a living process still appends to the segment."""
    try:
        with index.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _header(kind: Kind, payload_nbytes: int, identity: bytes) -> bytes:
    head = _HEADER.pack(_MAGIC, FORMAT_VERSION, KINDS.index(kind), payload_nbytes, identity)
    return head + _SUM.pack(zlib.crc32(head))


def _pack(record: Record) -> bytes:
    raw = _RECORD.pack(record.key, record.parent, record.checksum)
    return raw + _SUM.pack(zlib.crc32(raw, record.slot))


def _write(file: IO[bytes], data: bytes) -> None:
    """All of ``data``: an unbuffered write may take less."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
