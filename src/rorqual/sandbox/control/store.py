"""What the control plane owns, in one SQLite file: a row before anything is started, one for ever.

A row is written before its sandbox exists, and the sandbox's own id into it before anybody is told
of it. Whatever dies in between, the file and the directory of sandboxes together say what to adopt
and what to kill. This holds no sandbox and starts none.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import ConfigError, SandboxFailedError

State = Literal["creating", "warm", "running", "paused", "ended"]

_VERSION = 2
_SCHEMA = """
CREATE TABLE sandboxes (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    template TEXT NOT NULL,
    substrate TEXT NOT NULL,
    guest TEXT,
    host TEXT,
    access_token TEXT NOT NULL,
    started_s REAL NOT NULL,
    lease_end_s REAL NOT NULL,
    memory_bytes INTEGER NOT NULL,
    disk_bytes INTEGER NOT NULL,
    cpus REAL NOT NULL,
    pause_on_timeout INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    env TEXT NOT NULL,
    client_token TEXT,
    request_hash TEXT,
    ended_s REAL,
    end_reason TEXT
);
CREATE UNIQUE INDEX client_tokens ON sandboxes (owner, client_token)
    WHERE client_token IS NOT NULL;
CREATE INDEX states ON sandboxes (state);
"""
_FROM_1 = "ALTER TABLE sandboxes ADD COLUMN host TEXT;"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sandbox as it is remembered.

    Attributes:
        owner: id of the API key that made it; "" where none is asked for.
        guest: the sandbox's id on its host, once it has one.
        host: which host that is.
        lease_end_s: when the reaper ends (or pauses) it, seconds since 1970.
        client_token: the caller's name for the creation; the same one makes no second sandbox.
        end_reason: "killed", "expired", "lost", "failed".
    """

    id: str
    owner: str
    state: State
    template: str
    substrate: str
    guest: str | None = None
    host: str | None = None
    access_token: str
    started_s: float
    lease_end_s: float
    memory_bytes: int
    disk_bytes: int
    cpus: float
    pause_on_timeout: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    client_token: str | None = None
    request_hash: str | None = None
    ended_s: float | None = None
    end_reason: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether callers may use it."""
        return self.state in ("running", "paused")


_COLUMNS = tuple(column.name for column in fields(Row))


class Store:
    """The file; one control plane at a time, used from one thread.

    Raises:
        ConfigError: it is another program's, a newer version's, or in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"{path} is in use by another control plane") from None
        try:
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            # A crash of this process loses nothing; a crash of the machine takes the sandboxes too.
            self._db.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version in (0, 1):
                # One transaction: a half-made schema is never seen.
                change = _FROM_1 if version else _SCHEMA
                self._db.executescript(f"BEGIN;{change}PRAGMA user_version = {_VERSION};COMMIT;")
            elif version != _VERSION:
                raise ConfigError(f"{path} has schema version {version}, not {_VERSION}")
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise ConfigError(f"{path} cannot be used: {error}") from error
        except ConfigError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Release the file."""
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SandboxFailedError(f"{self.path}: {error}") from error

    def add(self, row: Row) -> None:
        """Commit a new row."""
        marks = ", ".join("?" * len(_COLUMNS))
        with self._explained():
            self._db.execute(
                f"INSERT INTO sandboxes ({', '.join(_COLUMNS)}) VALUES ({marks})", _values(row)
            )

    def update(self, row: Row, **changes: Any) -> Row:
        """Commit a change of a row; returns the row as it is now."""
        changed = replace(row, **changes)
        names = ", ".join(f"{name} = ?" for name in _COLUMNS)
        with self._explained():
            self._db.execute(
                f"UPDATE sandboxes SET {names} WHERE id = ?", (*_values(changed), row.id)
            )
        return changed

    def get(self, id: str) -> Row | None:
        """One row."""
        return next(iter(self._select("id = ?", id)), None)

    def by_client_token(self, owner: str, token: str) -> Row | None:
        """What this caller made under this name."""
        return next(iter(self._select("owner = ? AND client_token = ?", owner, token)), None)

    def active(self) -> list[Row]:
        """Everything that has not ended, oldest first."""
        return self._select("state <> 'ended' ORDER BY started_s, id")

    def forget_ended(self, before_s: float) -> int:
        """Drop rows that ended before then; returns how many."""
        with self._explained():
            cursor = self._db.execute(
                "DELETE FROM sandboxes WHERE state = 'ended' AND ended_s < ?", (before_s,)
            )
        return cursor.rowcount

    def _select(self, condition: str, *values: Any) -> list[Row]:
        with self._explained():
            rows = self._db.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM sandboxes WHERE {condition}", values
            ).fetchall()
        return [_row(dict(zip(_COLUMNS, row, strict=True))) for row in rows]


def _values(row: Row) -> tuple[Any, ...]:
    values = asdict(row)
    values["metadata"] = json.dumps(row.metadata)
    values["env"] = json.dumps(row.env)
    return tuple(values[name] for name in _COLUMNS)


def _row(values: dict[str, Any]) -> Row:
    values["metadata"] = json.loads(values["metadata"])
    values["env"] = json.loads(values["env"])
    values["pause_on_timeout"] = bool(values["pause_on_timeout"])
    return Row(**values)
