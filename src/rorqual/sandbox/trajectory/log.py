"""An append-only, globally ordered record of every command of every trajectory, in SQLite.

An intent is committed before its command is dispatched; the end is committed before the guest's
journal forgets it. Whatever dies in between, one of the two still knows. Records are never changed:
a restored snapshot is one more record, which makes those after its place void.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import TrajectoryError
from rorqual.sandbox.contract import ExecRequest, ExecResult

Kind = Literal["opened", "intent", "started", "finished", "snapshot", "restored", "branched"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    at_s REAL NOT NULL,
    trajectory TEXT NOT NULL,
    place INTEGER NOT NULL,
    kind TEXT NOT NULL,
    exec_id TEXT,
    request_hash TEXT,
    data TEXT NOT NULL,
    stdout BLOB,
    stderr BLOB
);
CREATE INDEX IF NOT EXISTS by_trajectory ON records (trajectory, sequence);
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the log.

    Attributes:
        sequence: order over all trajectories.
        place: which command of its trajectory, from 0.
        data: opened: sandbox, boot; intent: request; finished: result, digests; snapshot: id.
    """

    sequence: int
    at_s: float
    trajectory: str
    place: int
    kind: Kind
    exec_id: str | None
    request_hash: str | None
    data: dict[str, Any]
    stdout: bytes | None
    stderr: bytes | None


@dataclass
class Step:
    """What is known of one place: its newest valid intent and end."""

    intent: Record
    finished: Record | None = None


class TrajectoryLog:
    """The log in one file; usable by several processes, one per trajectory at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise TrajectoryError(f"{path} is not a trajectory log: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TrajectoryError(f"{self.path}: {error}") from error

    def append(
        self,
        trajectory: str,
        place: int,
        kind: Kind,
        data: dict[str, Any],
        *,
        exec_id: str | None = None,
        request_hash: str | None = None,
        stdout: bytes | None = None,
        stderr: bytes | None = None,
    ) -> int:
        """Commit one record; returns its sequence."""
        values = (
            time.time(),
            trajectory,
            place,
            kind,
            exec_id,
            request_hash,
            json.dumps(data, sort_keys=True),
            stdout,
            stderr,
        )
        with self._explained():
            cursor = self._db.execute(
                "INSERT INTO records (at_s, trajectory, place, kind, exec_id, request_hash, data,"
                " stdout, stderr) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def records(self, trajectory: str) -> list[Record]:
        """All records of a trajectory, in order."""
        names = ", ".join(field.name for field in fields(Record))
        with self._explained():
            rows = self._db.execute(
                f"SELECT {names} FROM records WHERE trajectory = ? ORDER BY sequence", (trajectory,)
            ).fetchall()
        return [
            Record(**dict(zip(names.split(", "), row, strict=True), data=json.loads(row[7])))
            for row in rows
        ]

    def trajectories(self) -> list[tuple[str, int, float]]:
        """Name, number of records and time of the last one, newest first."""
        with self._explained():
            rows = self._db.execute(
                "SELECT trajectory, COUNT(*), MAX(at_s) FROM records GROUP BY 1 ORDER BY 3 DESC"
            ).fetchall()
        return [(name, count, at) for name, count, at in rows]

    def steps(self, trajectory: str) -> list[Step]:
        """The valid commands of a trajectory by place."""
        return steps_of(self.records(trajectory))

    def branch(self, trajectory: str, new: str, place: int) -> None:
        """Start trajectory `new` as a copy of the first `place` commands of another.

        The new one begins from the newest snapshot at or before `place`.
        """
        if self.records(new):
            raise TrajectoryError(f"trajectory {new!r} exists")
        steps = self.steps(trajectory)
        if not 0 <= place <= len(steps):
            raise TrajectoryError(f"{trajectory!r} has {len(steps)} commands; no place {place}")
        snapshot = last_snapshot(self.records(trajectory), place)
        if snapshot is None:
            raise TrajectoryError(f"{trajectory!r} has no snapshot at or before command {place}")
        origin = {"from": trajectory, "place": snapshot.place, "snapshot": snapshot.data["id"]}
        self.append(new, snapshot.place, "branched", origin)
        for record in self.records(trajectory):
            step = steps[record.place] if record.place < snapshot.place else None
            if step is not None and record in (step.intent, step.finished):
                values = asdict(record)
                for name in ("sequence", "at_s", "trajectory"):
                    del values[name]
                self.append(new, **values)
        self.append(new, snapshot.place, "snapshot", snapshot.data)


def steps_of(records: list[Record]) -> list[Step]:
    """The valid commands: a restored snapshot voids what came after its place."""
    steps: list[Step] = []
    for record in records:
        if record.kind == "restored":
            del steps[record.place :]
        elif record.kind == "intent":
            if record.place != len(steps):
                raise TrajectoryError(
                    f"record {record.sequence} is out of place: {record.place}, not {len(steps)}"
                )
            steps.append(Step(record))
        elif record.kind == "finished":
            steps[record.place].finished = record
    return steps


def last_snapshot(records: list[Record], place: int | None = None) -> Record | None:
    """The newest snapshot, at or before `place`."""
    found = None
    for record in records:
        if record.kind == "restored" and found is not None and found.place > record.place:
            found = None
        if record.kind == "snapshot" and (place is None or record.place <= place):
            found = record
    return found


def hash_request(request: ExecRequest) -> str:
    """Identity of a request: everything that can change what it does."""
    content = json.dumps(intent_data(request), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def intent_data(request: ExecRequest) -> dict[str, Any]:
    """Everything needed to run a request again."""
    return {
        "argv": list(request.argv),
        "stdin": (request.stdin or b"").hex(),
        "env": dict(request.env),
        "cwd": request.cwd,
        "user": request.user,
        "timeout_s": request.timeout_s,
        "merge": request.merge,
    }


def logged_request(data: dict[str, Any]) -> ExecRequest:
    """The request an intent holds."""
    values = {**data, "argv": tuple(data["argv"]), "stdin": bytes.fromhex(data["stdin"])}
    return ExecRequest(**values)


def result_data(result: ExecResult) -> dict[str, Any]:
    """A result without its bytes, and the digests of all of its output."""
    digests = {}
    for name in ("stdout", "stderr"):
        file: Path | None = getattr(result, f"{name}_file")
        kept: bytes = getattr(result, name)
        digests[name] = hashlib.sha256(file.read_bytes() if file else kept).hexdigest()
    return {
        "returncode": result.returncode,
        "status": result.status,
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "max_rss_bytes": result.max_rss_bytes,
        "digests": digests,
    }


def stored_result(request: ExecRequest, finished: Record) -> ExecResult:
    """The answer of a command that ran before."""
    data = {
        name: value for name, value in finished.data.items() if name not in ("digests", "files")
    }
    return ExecResult(
        command=request.argv,
        stdout=finished.stdout or b"",
        stderr=finished.stderr or b"",
        replayed=True,
        **data,
    )
