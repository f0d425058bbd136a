"""What is in the cache directory: every segment's records, and which segment is worth least.

Knows files and keys, not tokens. Several processes may share a directory: each appends to segments
of its own and finds the others' by looking again (``refresh``); deleting happens under one lock,
and a file that vanishes under a reader is a miss.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rorqual.engine.cache import segment as files
from rorqual.engine.cache.segment import KINDS, Kind, Record

_LOCK = "lock"


@dataclass(eq=False)
class Segment:
    """A segment as far as it has been read."""

    name: str
    kind: Kind
    payload_nbytes: int
    uses: float
    """Decayed count up to ``last_use``."""
    last_use: float
    """Seconds since the epoch; survives in the index file's modification time."""
    num_slots: int = 0
    is_writing: bool = False
    """By this process."""
    keys: list[bytes] = field(default_factory=list)
    parents: set[bytes] = field(default_factory=set)
    """Keys in other segments that this one's records continue."""

    @property
    def nbytes(self) -> int:
        """On disk."""
        per_slot = self.payload_nbytes + files.RECORD_NBYTES
        return files.HEADER_NBYTES + self.num_slots * per_slot


class Place(NamedTuple):
    """Where a payload is."""

    segment: Segment
    record: Record


class Directory:
    """The index in memory. Not thread-safe: ``store`` locks around it.

    Args:
        identity: 16 bytes that stand for the model and the layout, also the root of all keys.
        payload_nbytes: bytes of a payload of each kind.

    Raises OSError if the directory cannot be made or read.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: bytes,
        payload_nbytes: dict[Kind, int],
        half_life_s: float,
    ) -> None:
        self.path = path / f"v{files.FORMAT_VERSION}-{identity.hex()}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.payload_nbytes = payload_nbytes
        self._identity = identity
        self._half_life_s = half_life_s
        self._segments: dict[str, Segment] = {}
        self._places: dict[Kind, dict[bytes, Place]] = {kind: {} for kind in KINDS}
        with self.locked():
            self._sweep()
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments known."""
        return sum(segment.nbytes for segment in self._segments.values())

    @property
    def num_blocks(self) -> int:
        """Blocks that can be read."""
        return len(self._places["block"])

    def find(self, kind: Kind, key: bytes) -> Place | None:
        """Where ``key`` is, if anywhere."""
        return self._places[kind].get(key)

    def is_reachable(self, parent: bytes) -> bool:
        """Whether a block that continues ``parent`` could be found by walking from the root."""
        return parent == self._identity or parent in self._places["block"]

    def forget(self, kind: Kind, place: Place) -> None:
        """Take a damaged or vanished payload out of the index: it may be written again."""
        if self._places[kind].get(place.record.key) is place:
            del self._places[kind][place.record.key]

    def use(self, keys: Iterable[bytes]) -> None:
        """Count one use of the segments that hold these blocks."""
        places = self._places["block"]
        now = time.time()
        for segment in {places[key].segment for key in keys if key in places}:
            segment.uses = self._uses(segment, now) + 1.0
            segment.last_use = now
            with contextlib.suppress(OSError):
                os.utime(files.paths(self.path, segment.name)[0])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that making and deleting segments needs, between threads and processes."""
        with (self.path / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def refresh(self) -> None:
        """Find what other processes have added or deleted."""
        seen: set[str] = set()
        with os.scandir(self.path) as entries:
            found = sorted(e.name for e in entries if e.name.endswith(".index"))
        for name in (entry.removesuffix(".index") for entry in found):
            seen.add(name)
            with contextlib.suppress(FileNotFoundError):
                self._read(name)
        for name in self._segments.keys() - seen:
            self._drop(self._segments[name])

    def added(self, segment: Segment, records: Iterable[Record], num_slots: int) -> None:
        """Enter records of ``segment`` into the index. Segments come in order of age."""
        self._segments[segment.name] = segment
        segment.num_slots = num_slots
        places, blocks = self._places[segment.kind], self._places["block"]
        for record in records:
            # The newest of several wins: it was written because the others could not be read.
            places[record.key] = Place(segment, record)
            segment.keys.append(record.key)
            before = blocks.get(record.parent)
            if before is None or before.segment is not segment:
                segment.parents.add(record.parent)

    def take_least(self) -> Segment | None:
        """Forget the segment worth least per byte, to be deleted; None if all must stay.

        A segment is worth its decayed uses x payloads, and what continues it on top: leaves go
        first. What cannot be reached from the root any more is worth nothing. Segments that a
        living process writes are spared. Call under ``locked`` after ``refresh``.
        """
        worth = self._worth()
        spared = {
            s.name
            for s in self._segments.values()
            if s.is_writing or files.is_being_written(files.paths(self.path, s.name)[0])
        }
        candidates = [s for s in self._segments.values() if s.name not in spared]
        if not candidates:
            return None
        least = min(candidates, key=lambda s: (worth[s.name] / s.nbytes, s.last_use, s.name))
        self._drop(least)
        self._forget_unreachable()
        return least

    def delete(self, segment: Segment) -> None:
        """Delete what ``take_least`` gave, under the same ``locked``. Needs no other lock."""
        for path in files.paths(self.path, segment.name):  # the index first: no names, no payloads
            path.unlink(missing_ok=True)

    # ---- inside -------------------------------------------------------------------------------
    def _sweep(self) -> None:
        """Delete what a crash left half made. Segments are made under the lock, so none is now."""
        for data in self.path.glob("*.data"):
            if not data.with_suffix(".index").exists():
                data.unlink(missing_ok=True)
        for index in self.path.glob("*.index"):
            is_damaged = files.read_kind(index, self.payload_nbytes, self._identity) is None
            if is_damaged and not files.is_being_written(index):
                index.unlink(missing_ok=True)
                index.with_suffix(".data").unlink(missing_ok=True)

    def _read(self, name: str) -> None:
        """Read what is new in a segment's index."""
        index, _ = files.paths(self.path, name)
        status = index.stat()
        segment = self._segments.get(name)
        if segment is None:
            kind = files.read_kind(index, self.payload_nbytes, self._identity)
            if kind is None:
                return
            nbytes = self.payload_nbytes[kind]
            segment = Segment(name, kind, nbytes, uses=1.0, last_use=status.st_mtime)
        slots = (status.st_size - files.HEADER_NBYTES) // files.RECORD_NBYTES
        if not segment.is_writing and slots > segment.num_slots:
            self.added(segment, *files.read_records(index, segment.num_slots))
        self._segments.setdefault(name, segment)

    def _drop(self, segment: Segment) -> None:
        del self._segments[segment.name]
        self._forget_all(segment)

    def _forget_all(self, segment: Segment) -> None:
        places = self._places[segment.kind]
        for key in segment.keys:
            place = places.get(key)
            if place is not None and place.segment is segment:
                del places[key]
        segment.keys.clear()

    def _forget_unreachable(self) -> None:
        """After a deletion: what continued it cannot be found; stop continuing that, too."""
        continued = self._continued_by()
        reached = self._reached(continued)
        for segment in self._segments.values():
            if segment.name not in reached:
                self._forget_all(segment)

    def _continued_by(self) -> dict[str, set[str]]:
        """For each segment the others that continue it; under "" those that begin at the root."""
        continued: dict[str, set[str]] = {"": set()}
        for segment in self._segments.values():
            for parent in segment.parents:
                if parent == self._identity:
                    continued[""].add(segment.name)
                elif (place := self._places["block"].get(parent)) is not None:
                    continued.setdefault(place.segment.name, set()).add(segment.name)
        return continued

    def _reached(self, continued: dict[str, set[str]], start: str = "") -> set[str]:
        reached: set[str] = set()
        frontier = [start]
        while frontier:
            new = continued.get(frontier.pop(), set()) - reached
            reached |= new
            frontier += new
        return reached

    def _worth(self) -> dict[str, float]:
        now = time.time()
        own = {
            name: self._uses(segment, now) * len(segment.keys)
            for name, segment in self._segments.items()
        }
        continued = self._continued_by()
        reached = self._reached(continued)
        return {
            name: sum(own[other] for other in self._reached(continued, name) | {name})
            if name in reached
            else 0.0
            for name in self._segments
        }

    def _uses(self, segment: Segment, now: float) -> float:
        age_s = max(0.0, now - segment.last_use)
        return float(segment.uses * 0.5 ** (age_s / self._half_life_s))
