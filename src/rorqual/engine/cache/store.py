"""The cache on disk: finished blocks and checkpoints, written behind the engine's back.

The engine's thread offers payloads and reads; a thread of the store's writes them in order, batch
by batch, and deletes what is worth least when the directory outgrows its limit. Offering never
waits: when the queue is full the offer is refused and can be repeated. What ``flush`` has waited
for survives a crash; see ``segment`` for why nothing wrong is ever read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rorqual.engine.cache import segment as files
from rorqual.engine.cache.directory import Directory, Segment
from rorqual.engine.cache.segment import KINDS, Kind, Payload, SegmentWriter
from rorqual.errors import ConfigError

_log = logging.getLogger(__name__)
_WAIT_S = 60.0
_SEGMENTS = 16
"""Segments a full directory has at least, so that deleting one costs little."""
_MAX_SEGMENT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """A snapshot."""

    num_blocks: int
    nbytes: int
    queued_bytes: int
    written_bytes: int
    """Since opening."""
    num_damaged: int
    """Payloads that failed their checksum or were gone, since opening."""
    num_deleted: int
    """Segments deleted for space, since opening."""
    num_skipped: int
    """Blocks not written because what they continue is no longer on disk."""
    error: str | None
    """Why writing stopped; reading goes on."""


class _Offer(NamedTuple):
    kind: Kind
    payload: Payload


class Store:
    """Blocks and checkpoints by digest, in one directory that several processes may share.

    Thread-safe. ``close()`` it: that writes what is queued.

    Args:
        limit_bytes: size the directory of this model may grow to. What living processes are
            writing is spared, so it may be exceeded by one segment (1/16 of it) of each kind.
        queue_bytes: payloads waiting to be written, at most.

    Raises:
        ConfigError: the directory cannot be used, or the limit is too small for anything.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: bytes,
        block_nbytes: int,
        checkpoint_nbytes: int,
        limit_bytes: int,
        queue_bytes: int = 256 << 20,
        half_life_s: float = 7 * 86_400.0,
    ) -> None:
        self._payload_nbytes: dict[Kind, int] = {
            "block": block_nbytes, "checkpoint": checkpoint_nbytes,
        }  # fmt: skip
        if limit_bytes < _SEGMENTS * max(self._payload_nbytes.values()):
            raise ConfigError(
                f"a disk cache of {limit_bytes} bytes is too small; this model needs at least "
                f"{_SEGMENTS * max(self._payload_nbytes.values())}"
            )
        self._identity = identity
        self._limit_bytes = limit_bytes
        self._queue_limit = queue_bytes
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, limit_bytes // _SEGMENTS)
        try:
            self._directory = Directory(
                path,
                identity=identity,
                payload_nbytes=self._payload_nbytes,
                half_life_s=half_life_s,
            )
        except OSError as error:
            raise ConfigError(f"cannot use the cache directory {path}: {error}") from error
        # The writer's thread only.
        self._writers: dict[Kind, tuple[SegmentWriter, Segment]] = {}
        # Below, and the directory: under _changed.
        self._changed = threading.Condition()
        self._queue: deque[_Offer] = deque()
        self._pending: set[tuple[Kind, bytes]] = set()
        self._queued_bytes = 0
        self._is_closing = False
        self._error: str | None = None
        self._written_bytes = self._num_damaged = self._num_deleted = self._num_skipped = 0
        self._thread = threading.Thread(target=self._run, name="rorqual-cache", daemon=True)
        self._thread.start()

    def has(self, kind: Kind, key: bytes) -> bool:
        """Whether ``read`` would probably find it."""
        with self._changed:
            return self._directory.find(kind, key) is not None

    def num_known(self, blocks: Sequence[bytes]) -> int:
        """How many of a prefix's blocks, from the first, are on disk or on their way there."""
        with self._changed:
            for count, key in enumerate(blocks):
                if ("block", key) not in self._pending and not self._directory.find("block", key):
                    return count
        return len(blocks)

    def read(self, kind: Kind, key: bytes) -> bytes | None:
        """The payload exactly as offered, or None."""
        while True:
            with self._changed:
                place = self._directory.find(kind, key)
            if place is None:
                return None
            _, data = files.paths(self._directory.path, place.segment.name)
            try:
                found = files.read_payload(data, place.record, self._payload_nbytes[kind])
            except OSError:
                found = None
            if found is not None:
                return found
            with self._changed:  # another process may have written it, too
                self._num_damaged += 1
                self._directory.forget(kind, place)

    def offer(self, kind: Kind, key: bytes, parent: bytes, data: bytes) -> bool:
        """Queue a payload to be written; never waits. False if the queue is full.

        parent: the block this one continues (or, for a checkpoint, its own block), which must have
        been offered before; otherwise nothing is written.
        """
        with self._changed:
            if (kind, key) in self._pending or self._directory.find(kind, key) is not None:
                return True
            full = self._queue and self._queued_bytes + len(data) > self._queue_limit
            if full or self._error is not None or self._is_closing:
                return False
            self._queue.append(_Offer(kind, Payload(key, parent, data)))
            self._pending.add((kind, key))
            self._queued_bytes += len(data)
            self._changed.notify_all()
        return True

    def use(self, keys: Sequence[bytes]) -> None:
        """Count one use of these blocks: what is used stays longer."""
        with self._changed:
            self._directory.use(keys)

    def refresh(self) -> None:
        """See what other processes have written or deleted."""
        with self._changed:
            try:
                self._directory.refresh()
            except OSError as error:
                _log.warning("the cache directory cannot be read: %s", error)

    def flush(self, timeout_s: float = _WAIT_S) -> None:
        """Wait until everything offered is durable, or writing has failed (``stats().error``).

        Raises:
            TimeoutError: it is not after ``timeout_s``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, timeout_s):
                raise TimeoutError(f"{self._queued_bytes} bytes unwritten after {timeout_s} s")

    def close(self, timeout_s: float = _WAIT_S) -> None:
        """Write what is queued and stop. Idempotent.

        Raises:
            TimeoutError: still writing after ``timeout_s``.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the cache is still being written after {timeout_s} s")

    def stats(self) -> StoreStats:
        """A consistent snapshot."""
        with self._changed:
            return StoreStats(
                num_blocks=self._directory.num_blocks,
                nbytes=self._directory.nbytes,
                queued_bytes=self._queued_bytes,
                written_bytes=self._written_bytes,
                num_damaged=self._num_damaged,
                num_deleted=self._num_deleted,
                num_skipped=self._num_skipped,
                error=self._error,
            )

    # ---- the writer's thread ------------------------------------------------------------------
    def _run(self) -> None:
        while (batch := self._take()) is not None:
            try:
                if self._error is None:
                    self._write(batch)
                    self._shrink()
            except Exception as error:  # whoever waits for the batch must not wait for ever
                reason = str(error) or repr(error)
                _log.error("the cache is no longer written to disk: %s", reason)
                with self._changed:
                    self._error = reason
            self._done(batch)
        for writer, _ in self._writers.values():
            writer.close()

    def _take(self) -> list[_Offer] | None:
        """All that is queued; None once closing and empty."""
        with self._changed:
            while not self._queue:
                if self._is_closing:
                    return None
                self._changed.wait(_WAIT_S)
            batch = list(self._queue)
            self._queue.clear()
            return batch

    def _done(self, batch: Sequence[_Offer]) -> None:
        with self._changed:
            for kind, payload in batch:
                self._pending.discard((kind, payload.key))
                self._queued_bytes -= len(payload.data)
            self._changed.notify_all()

    def _write(self, batch: Sequence[_Offer]) -> None:
        self.refresh()  # what another process wrote or deleted need not or cannot be continued
        for kind in KINDS:  # blocks first: checkpoints refer to them
            payloads = [offer.payload for offer in batch if offer.kind == kind]
            while payloads := self._writable(kind, payloads):
                writer, segment = self._writer(kind)
                room = self._segment_bytes - segment.nbytes
                count = max(1, room // self._payload_nbytes[kind])
                now, payloads = payloads[:count], payloads[count:]
                records = writer.append(now)
                with self._changed:
                    self._directory.added(segment, records, writer.num_slots)
                    self._written_bytes += sum(len(payload.data) for payload in now)

    def _writable(self, kind: Kind, payloads: Sequence[Payload]) -> list[Payload]:
        """Those that nobody wrote meanwhile and that continue something on disk or each other."""
        kept: list[Payload] = []
        keys: set[bytes] = set()
        with self._changed:
            for payload in payloads:
                if self._directory.find(kind, payload.key) is not None:
                    continue
                if payload.parent in keys or self._directory.is_reachable(payload.parent):
                    keys.add(payload.key)
                    if not self._directory.is_cut(kind, payload.key):
                        kept.append(payload)
                else:
                    self._num_skipped += 1
        return kept

    def _writer(self, kind: Kind) -> tuple[SegmentWriter, Segment]:
        """A segment with room."""
        if kind in self._writers:
            writer, segment = self._writers[kind]
            is_full = segment.nbytes + self._payload_nbytes[kind] > self._segment_bytes
            with self._changed:
                is_dead = self._directory.is_dead(segment)
            if not is_full and not is_dead:
                return writer, segment
            self._seal(kind)
        with self._directory.locked():
            writer = SegmentWriter(
                self._directory.path, kind, self._payload_nbytes[kind], self._identity
            )
        now = time.time()
        segment = Segment(
            writer.name, kind, self._payload_nbytes[kind], uses=1.0, last_use=now, is_writing=True
        )
        with self._changed:
            self._directory.added(segment, (), 0)
        self._writers[kind] = writer, segment
        return writer, segment

    def _seal(self, kind: Kind) -> None:
        writer, segment = self._writers.pop(kind)
        writer.close()
        segment.is_writing = False

    def _shrink(self) -> None:
        """Delete segments until the directory is within its limit."""
        with self._changed:
            if self._directory.nbytes <= self._limit_bytes:
                return
        with self._directory.locked():
            while (segment := self._least()) is not None:
                self._directory.delete(segment)  # may take long; the engine need not wait

    def _least(self) -> Segment | None:
        """The next segment to delete; None if within the limit or nothing can go."""
        with self._changed:
            self._directory.refresh()
            if self._directory.nbytes <= self._limit_bytes:
                return None
            for kind, (_, segment) in list(self._writers.items()):
                if self._directory.is_dead(segment):
                    self._seal(kind)
            least = self._directory.take_least()
            self._num_deleted += least is not None
            return least
