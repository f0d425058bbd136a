"""One JSON line per finished request. Never holds a header, a query string, a prompt or a key.

Lines are collected and written together from a worker thread, so that neither a slow disk nor a
pipe nobody reads holds up the event loop. What cannot be written in time is counted, not kept.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec

from rorqual.server.record import RequestRecord

_FLUSH_S = 0.1
_MAX_WAITING = 10_000
"""Lines kept while the file does not take any; about 3 MB."""


class AccessLog:
    """Writes to ``file``, which stays open and is the caller's. Used on one event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []
        self._num_lost = 0
        self._writing: asyncio.Future[None] | None = None

    def report(self, record: RequestRecord, method: str, route: str) -> None:
        """Log a request that has ended; returns at once."""
        if len(self._lines) >= _MAX_WAITING:
            self._num_lost += 1
            return
        self._lines.append(line_of(record, method, route, time.time()))
        if len(self._lines) == 1 and self._writing is None:
            asyncio.get_running_loop().call_later(_FLUSH_S, self._start_writing)

    def flush(self) -> None:
        """Write what is left; for the end, when no event loop runs any more."""
        self._write(self._take())

    def _start_writing(self) -> None:
        if self._lines and self._writing is None:
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, self._write, self._take())
            self._writing.add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        self._writing = None
        if not done.cancelled() and done.exception() is None:
            self._start_writing()

    def _take(self) -> bytes:
        lost = b'{"lost_lines":%d}\n' % self._num_lost if self._num_lost else b""
        text = b"".join(self._lines) + lost
        self._lines.clear()
        self._num_lost = 0
        return text

    def _write(self, text: bytes) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):  # full disk, closed pipe: serving goes on without a log
            self._num_lost += text.count(b"\n")


def line_of(record: RequestRecord, method: str, route: str, now: float) -> bytes:
    """The line of one request that ended at Unix time ``now``; fields without a value are left out.

    ``ms`` counts from the request's arrival to the last byte, ``ttft_ms`` to the first token.
    """
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "key": record.key.name if record.key else None,
        "method": method,
        "route": route,
        "status": record.status,
        "ms": round(record.elapsed_s() * 1000, 2),
        "model": record.model,
        "mode": record.mode,
    }
    if record.finish is not None:
        fields |= {
            "ttft_ms": None if record.ttft_s is None else round(record.ttft_s * 1000, 2),
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "finish": record.finish,
        }
    present = {name: value for name, value in fields.items() if value is not None}
    return msgspec.json.encode(present) + b"\n"
