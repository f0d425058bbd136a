"""What is in the cache directory: every segment's records, and which segment is worth least.

Knows files and keys, not tokens. Several processes may share a directory: each appends to segments
of its own and finds the others' by looking again (``refresh``); deleting happens under one lock,
and a file that vanishes under a reader is a miss.

A block is of use only while all before it can be read, too. Those cut off from the root count as
missing until what they continue is written again, and are worth nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Collection, Iterable, Iterator
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
    """Keys this one's records continue and do not follow here: most are in other segments."""

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
        # Blocks that are there but continue something that is not.
        self._cut: set[bytes] = set()
        # What processes that did not yet see each other wrote twice, oldest first.
        self._spares: dict[Kind, dict[bytes, list[Place]]] = {kind: {} for kind in KINDS}
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
        return len(self._places["block"]) - len(self._cut)

    def find(self, kind: Kind, key: bytes) -> Place | None:
        """Where ``key`` is, if anywhere. A checkpoint is found if its block is."""
        return self._places[kind].get(key) if self.is_reachable(key) else None

    def is_reachable(self, block: bytes) -> bool:
        """Whether ``block``, or the root, could be found by walking from the root."""
        if block in self._cut:
            return False
        return block == self._identity or block in self._places["block"]

    def is_cut(self, kind: Kind, key: bytes) -> bool:
        """Whether ``key`` is there and would be found again if what it continues were."""
        return key in self._places[kind] and not self.is_reachable(key)

    def is_dead(self, segment: Segment) -> bool:
        """Whether nothing that was written to ``segment`` is read from it any more."""
        found = (self.find(segment.kind, key) for key in segment.keys)
        return not any(place and place.segment is segment for place in found)

    def forget(self, kind: Kind, place: Place) -> None:
        """Take a damaged or vanished payload out of the index: it may be written again."""
        if self._places[kind].get(place.record.key) is place:
            # What followed it in its segment continues another's copy from now on, if anything.
            place.segment.parents.add(place.record.key)
            self._lose(kind, [place.record.key])

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
        joined: set[bytes] = set()
        for record in records:
            # The newest of several wins: it may have been written because the others are damaged.
            older = places.get(record.key)
            places[record.key] = Place(segment, record)
            segment.keys.append(record.key)
            before = blocks.get(record.parent)
            if before is None or before.segment is not segment:
                segment.parents.add(record.parent)
            if older is not None:
                self._spares[segment.kind].setdefault(record.key, []).append(older)
            elif segment.kind == "block":
                (joined if self.is_reachable(record.parent) else self._cut).add(record.key)
        if self._cut:
            self._follow(joined, is_cut=False)

    def take_least(self) -> Segment | None:
        """Forget the segment worth least per byte, to be deleted; None if all must stay.

        A segment is worth its decayed uses x the payloads that are read from it, and what continues
        it on top: spares and leaves go first. Segments that a living process writes stay. Call
        under ``locked`` after ``refresh``.
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
        places, spares = self._places[segment.kind], self._spares[segment.kind]
        for key in segment.keys:
            if key in spares:
                kept = [place for place in spares.pop(key) if place.segment is not segment]
                if kept:
                    spares[key] = kept
        held = {key for key in segment.keys if key in places and places[key].segment is segment}
        self._lose(segment.kind, held)

    def _lose(self, kind: Kind, keys: Collection[bytes]) -> None:
        """These cannot be read where they were: another process may have written them, too."""
        lost: set[bytes] = set()
        for key in keys:
            spares = self._spares[kind].pop(key, [])
            if spares:
                self._places[kind][key] = spares.pop()
            else:
                del self._places[kind][key]
                lost.add(key)
            if spares:
                self._spares[kind][key] = spares
        if kind == "block":
            self._cut -= lost
            self._follow(lost, is_cut=True)

    def _follow(self, blocks: set[bytes], *, is_cut: bool) -> None:
        """Cut off from the root what continues ``blocks``, or join it to the root again."""
        places = self._places["block"]
        while blocks:
            reached: set[bytes] = set()
            for segment in self._segments.values():
                if segment.kind != "block" or segment.parents.isdisjoint(blocks):
                    continue
                for key in segment.keys:  # what continues another comes after it, as a rule
                    if key not in places or (key in self._cut) == is_cut:
                        continue
                    parent = places[key].record.parent
                    if parent in blocks or parent in reached:
                        reached.add(key)
            if is_cut:
                self._cut |= reached
            else:
                self._cut -= reached
            blocks = reached

    def _continued_by(self) -> dict[str, set[str]]:
        """For each segment the others that continue it."""
        continued: dict[str, set[str]] = {}
        for segment in self._segments.values():
            for parent in segment.parents:
                if (place := self._places["block"].get(parent)) is not None:
                    continued.setdefault(place.segment.name, set()).add(segment.name)
        return continued

    def _reached(self, continued: dict[str, set[str]], start: str) -> set[str]:
        reached: set[str] = set()
        frontier = [start]
        while frontier:
            new = continued.get(frontier.pop(), set()) - reached
            reached |= new
            frontier += new
        return reached

    def _worth(self) -> dict[str, float]:
        now = time.time()
        counts = {name: len(segment.keys) for name, segment in self._segments.items()}
        for place in self._unread():
            counts[place.segment.name] -= 1
        own = {
            name: self._uses(segment, now) * counts[name]
            for name, segment in self._segments.items()
        }
        continued = self._continued_by()
        return {
            name: sum(own[other] for other in self._reached(continued, name) | {name})
            for name in self._segments
        }

    def _unread(self) -> Iterator[Place]:
        """Payloads of no use at present."""
        for spares in self._spares.values():
            yield from itertools.chain.from_iterable(spares.values())
        yield from (self._places["block"][key] for key in self._cut)
        checkpoints = self._places["checkpoint"]
        yield from (place for key, place in checkpoints.items() if not self.is_reachable(key))

    def _uses(self, segment: Segment, now: float) -> float:
        age_s = max(0.0, now - segment.last_use)
        return float(segment.uses * 0.5 ** (age_s / self._half_life_s))
