"""The server's memory of the turns it generated; why it has one says ``protocol/history.py``.

One SQLite database, in memory or in a file that outlives the process. Owned by whoever makes it
(the command line), who closes it; the routes only read and add. Bounded: the oldest turns go
first. Turns are kept per owner, so nobody is helped by what somebody else was told.

What is stored is what the client was sent and the token ids of it, nothing of prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.protocol.history import Call, Turn

_log = logging.getLogger(__name__)

MAX_TURNS = 50_000
MAX_BYTES = 512 * 1024 * 1024
"""Default bounds; a turn of 2,000 tokens takes about 16 KB."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    id INTEGER PRIMARY KEY AUTOINCREMENT, bytes INTEGER NOT NULL,
    reasoning TEXT NOT NULL, content TEXT NOT NULL, calls TEXT NOT NULL,
    thinks INTEGER NOT NULL, ids BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS keys (key BLOB PRIMARY KEY, turn INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_by_turn ON keys (turn);
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
"""
_FIND = """
SELECT reasoning, content, calls, thinks, ids FROM turns JOIN keys ON turns.id = keys.turn
WHERE keys.key = ?
"""


class History:
    """Turns by owner and key. Any thread; use as a context manager or ``close`` it.

    Args:
        path: the database file, made if missing; None keeps everything in memory.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_turns: int = MAX_TURNS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._max_turns = max_turns
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        name = ":memory:" if path is None else str(path)
        try:
            if path is not None:
                path.touch(mode=0o600)  # answers are their owners' business
            self._db = sqlite3.connect(name, check_same_thread=False, isolation_level=None)
            self._db.executescript(_SCHEMA)
            totals = self._db.execute("SELECT count(*), total(bytes) FROM turns").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{name}: not usable as a history file: {error}") from None
        self._num_turns, self._num_bytes = int(totals[0]), int(totals[1])

    def __len__(self) -> int:
        """Number of turns kept."""
        return self._num_turns

    def find(self, owner: str, keys: Sequence[str]) -> Turn | None:
        """The turn remembered for ``owner`` under the first of ``keys`` that has one."""
        for key in keys:
            with self._lock:
                row = self._db.execute(_FIND, (_hashed(owner, key),)).fetchone()
            if row is not None:
                calls = tuple(Call(*call) for call in json.loads(row[2]))
                return Turn(row[0], row[1], calls, bool(row[3]), tuple(array("I", row[4])))
        return None

    def remember(self, owner: str, keys: Sequence[str], turn: Turn) -> None:
        """Keep ``turn`` under all ``keys``; what they stood for before is forgotten."""
        ids = array("I", turn.ids).tobytes()
        calls = json.dumps(turn.calls)
        size = 200 + len(ids) + len(calls) + len(turn.reasoning) + len(turn.content)
        try:
            self._add(owner, keys, turn, calls, ids, size)
        except sqlite3.Error as error:  # a full disk must not cost anybody an answer
            _log.warning("a turn could not be remembered: %s", error)

    def _add(
        self, owner: str, keys: Sequence[str], turn: Turn, calls: str, ids: bytes, size: int
    ) -> None:
        with self._lock, self._db:
            self._db.execute("BEGIN")
            row = (size, turn.reasoning, turn.content, calls, turn.thinks, ids)
            number = self._db.execute(
                "INSERT INTO turns (bytes, reasoning, content, calls, thinks, ids) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            self._db.executemany(
                "INSERT OR REPLACE INTO keys VALUES (?, ?)",
                [(_hashed(owner, key), number) for key in keys],
            )
            self._num_turns += 1
            self._num_bytes += size
            while self._num_turns > self._max_turns or self._num_bytes > self._max_bytes:
                self._forget_oldest()

    def of(self, owner: str) -> OwnersHistory:
        """The memory of one owner, as rendering wants it."""
        return OwnersHistory(self, owner)

    def close(self) -> None:
        """Release the database."""
        with self._lock:
            self._db.close()

    def _forget_oldest(self) -> None:
        number, size = self._db.execute(
            "SELECT id, bytes FROM turns ORDER BY id LIMIT 1"
        ).fetchone()
        self._db.execute("DELETE FROM keys WHERE turn = ?", (number,))
        self._db.execute("DELETE FROM turns WHERE id = ?", (number,))
        self._num_turns -= 1
        self._num_bytes -= size

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OwnersHistory:
    """What one owner is remembered by."""

    def __init__(self, history: History, owner: str) -> None:
        self._history = history
        self._owner = owner

    def find(self, keys: Sequence[str]) -> Turn | None:
        """See ``History.find``."""
        return self._history.find(self._owner, keys)

    def remember(self, keys: Sequence[str], turn: Turn) -> None:
        """See ``History.remember``."""
        self._history.remember(self._owner, keys, turn)


def _hashed(owner: str, key: str) -> bytes:
    text = json.dumps([owner, key]).encode()
    return hashlib.blake2b(text, digest_size=20).digest()
