"""API keys: made, listed and revoked in one SQLite file; looked up by the server from memory.

A key is ``rq_ID_SECRET``: a public id and 256 random bits. Only a keyed BLAKE2b digest of it is
stored. A slow password hash protects secrets that can be guessed; 256 random bits cannot, and it
would cost every request tens of milliseconds. The hash is keyed with a value of its own per file,
so digests are worth nothing outside it. ids are found by lookup, digests compared in constant time.

SQLite through the standard library: one table, four statements, and the command line and a running
server may use the file at the same time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError

_REFRESH_S = 0.25
"""Longest time a change of the file goes unnoticed, given requests."""
_MAX_KEY_CHARS = 200
_ID_BYTES, _SECRET_BYTES = 6, 32
_SCHEMA = """
CREATE TABLE IF NOT EXISTS hashing (hash_key BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL,
    models TEXT,
    modes TEXT,
    requests_per_minute INTEGER,
    max_concurrent INTEGER,
    created_at REAL NOT NULL,
    expires_at REAL,
    revoked_at REAL,
    tokens_per_minute INTEGER
);
CREATE UNIQUE INDEX IF NOT EXISTS active_names ON keys (name) WHERE revoked_at IS NULL;
"""
_COLUMNS = (
    "id, name, digest, models, modes, requests_per_minute, max_concurrent, created_at, "
    "expires_at, revoked_at, tokens_per_minute"
)


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """What a key is good for; None allows everything."""

    models: frozenset[str] | None = None
    modes: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    expires_at: float | None = None
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key as stored: everything but the secret."""

    id: str
    name: str
    digest: bytes
    permissions: Permissions
    created_at: float
    revoked_at: float | None

    def state(self, now: float) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.permissions.expires_at
        return "expired" if expires_at is not None and now >= expires_at else "active"


class KeyStore:
    """The file of keys; close it, or use it as a context manager. One thread at a time.

    Raises:
        ConfigError: the file cannot be read or written, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            # A writer holds its lock for microseconds. The server asks from its event loop.
            self._db = sqlite3.connect(
                path, timeout=2.0, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not meet
            self._db.executescript(_SCHEMA)
            self._add_missing_column()
            self._hash_key = self._read_hash_key()
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from None

    def create(self, name: str, permissions: Permissions) -> tuple[ApiKey, str]:
        """A new key and its text, which nobody can show again.

        Raises:
            ConfigError: the name is empty or an active key's.
        """
        if not name.strip() or not name.isprintable():
            raise ConfigError("a key needs a name of printable characters")
        key_id = secrets.token_hex(_ID_BYTES)
        text = f"rq_{key_id}_{secrets.token_hex(_SECRET_BYTES)}"
        key = ApiKey(
            id=key_id,
            name=name,
            digest=self.digest(text),
            permissions=permissions,
            created_at=time.time(),
            revoked_at=None,
        )
        try:
            self._db.execute(
                f"INSERT INTO keys ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", _row_of(key)
            )
        except sqlite3.IntegrityError:
            raise ConfigError(f"there is an active key {name!r} already; revoke it first") from None
        except sqlite3.Error as error:
            raise self._failure(error) from None
        return key, text

    def list(self) -> list[ApiKey]:
        """All keys, oldest first."""
        try:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created_at").fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from None
        return [_key_of(row) for row in rows]

    def revoke(self, name_or_id: str) -> ApiKey:
        """End an active key. Raises ConfigError if there is none of that name or id."""
        for key in self.list():
            if key.revoked_at is None and name_or_id in (key.name, key.id):
                try:
                    self._db.execute(
                        "UPDATE keys SET revoked_at = ? WHERE id = ?", (time.time(), key.id)
                    )
                except sqlite3.Error as error:
                    raise self._failure(error) from None
                return key
        raise ConfigError(f"{self.path}: no active key {name_or_id!r}")

    def digest(self, text: str) -> bytes:
        """What is stored of a key."""
        return hashlib.blake2b(text.encode(), key=self._hash_key, digest_size=32).digest()

    def version(self) -> tuple[int, int]:
        """Changes whenever this or another connection changed the file; takes microseconds."""
        try:
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from None
        return int(version), self._db.total_changes

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def __enter__(self) -> KeyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_missing_column(self) -> None:
        """Files of earlier releases know no limit of tokens."""
        columns = [row[1] for row in self._db.execute("PRAGMA table_info(keys)").fetchall()]
        if "tokens_per_minute" not in columns:
            self._db.execute("ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER")

    def _read_hash_key(self) -> bytes:
        self._db.execute(
            "INSERT INTO hashing SELECT ? WHERE NOT EXISTS (SELECT 1 FROM hashing)",
            (secrets.token_bytes(32),),
        )
        with closing(self._db.execute("SELECT hash_key FROM hashing")) as rows:
            return bytes(rows.fetchone()[0])

    def _failure(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.path}: the key file cannot be used: {error}")


class KeyRing:
    """The keys a running server accepts: a copy of the file's, renewed when the file changes."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._version = store.version()
        self._keys = _by_id(store.list())
        self._checked_at = clock()
        self._no_digest = store.digest("")

    @property
    def num_active(self) -> int:
        """Keys that would be accepted now."""
        now = time.time()
        return sum(key.state(now) == "active" for key in self._keys.values())

    def find(self, text: str) -> ApiKey | None:
        """The key whose text this is, active or not; None for a stranger.

        Raises:
            ConfigError: the file can no longer be read, so that nobody knows what was revoked.
        """
        self._refresh()
        parts = text.split("_") if len(text) <= _MAX_KEY_CHARS else []
        key = self._keys.get(parts[1]) if len(parts) == 3 else None
        digest = self._store.digest(text[:_MAX_KEY_CHARS])
        # Strangers cost the same as holders of a wrong secret.
        is_same = hmac.compare_digest(digest, self._no_digest if key is None else key.digest)
        return key if is_same else None

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked_at < _REFRESH_S:
            return
        version = self._store.version()
        if version != self._version:
            self._keys = _by_id(self._store.list())
            self._version = version
        self._checked_at = now


def _by_id(keys: Iterable[ApiKey]) -> dict[str, ApiKey]:
    return {key.id: key for key in keys}


def _row_of(key: ApiKey) -> tuple[object, ...]:
    may = key.permissions
    return (
        key.id,
        key.name,
        key.digest,
        _joined(may.models),
        _joined(may.modes),
        may.requests_per_minute,
        may.max_concurrent,
        key.created_at,
        may.expires_at,
        key.revoked_at,
        may.tokens_per_minute,
    )


def _key_of(row: tuple[Any, ...]) -> ApiKey:
    key_id, name, digest, models, modes, requests, concurrent, created, expires, *rest = row
    revoked, tokens = rest
    return ApiKey(
        id=key_id,
        name=name,
        digest=bytes(digest),
        permissions=Permissions(
            models=_split(models),
            modes=_split(modes),
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            max_concurrent=concurrent,
            expires_at=expires,
        ),
        created_at=created,
        revoked_at=revoked,
    )


def _joined(names: frozenset[str] | None) -> str | None:
    return None if names is None else "\n".join(sorted(names))


def _split(text: object) -> frozenset[str] | None:
    return None if text is None else frozenset(str(text).split("\n"))
