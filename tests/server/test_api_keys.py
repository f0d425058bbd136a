"""Keys: what is stored of them, who is let in, and how a running server follows."""

from __future__ import annotations

import dataclasses
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.server.keys import ApiKey, KeyRing, KeyStore, Permissions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.sqlite3"


def test_key_is_stored_without_its_secret_for_its_owner_only(path: Path) -> None:
    permissions = Permissions(
        models=frozenset({"a", "b"}),
        modes=frozenset({"think"}),
        requests_per_minute=5,
        tokens_per_minute=700,
        max_concurrent=2,
        expires_at=time.time() + 60,
    )
    with KeyStore(path) as store:
        key, text = store.create("ci", permissions)
        assert store.list() == [key]
    with KeyStore(path) as again:
        assert again.list() == [key]
        assert again.digest(text) == key.digest
    secret = text.split("_")[2]
    assert len(secret) == 64
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_same_text_has_another_digest_in_another_file(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "a") as a, KeyStore(tmp_path / "b") as b:
        assert a.digest("rq_1_2") != b.digest("rq_1_2")


def test_names_are_one_active_keys(path: Path) -> None:
    with KeyStore(path) as store:
        first, _ = store.create("ci", Permissions())
        with pytest.raises(ConfigError, match="an active key 'ci' already"):
            store.create("ci", Permissions())
        store.revoke("ci")
        second, _ = store.create("ci", Permissions())
        assert store.revoke(second.id) == second
        assert [key.state(time.time()) for key in store.list()] == ["revoked", "revoked"]
        assert first.id != second.id
        with pytest.raises(ConfigError, match="no active key 'ci'"):
            store.revoke("ci")
        for name in ("", " ", "a\nb"):
            with pytest.raises(ConfigError, match="printable"):
                store.create(name, Permissions())


def test_ring_finds_the_holder_and_nobody_else(path: Path) -> None:
    with KeyStore(path) as store:
        key, text = store.create("ci", Permissions())
        other, _ = store.create("other", Permissions())
        ring = KeyRing(store)
        assert ring.find(text) == key
        assert ring.num_active == 2
        prefix, _, secret = text.split("_")
        wrong = [
            "",
            "any",
            "rq__",
            text[:-1],
            text + "0",
            text.upper(),
            f"{prefix}_{other.id}_{secret}",
            "_" * 1000,
            text + "x" * 10_000,
            "rq_ü_ö",
        ]
        assert [ring.find(attempt) for attempt in wrong] == [None] * len(wrong)


def test_ring_follows_another_process_within_its_refresh_time(path: Path) -> None:
    now = [0.0]
    with KeyStore(path) as store, KeyStore(path) as elsewhere:
        ring = KeyRing(store, clock=lambda: now[0])
        key, text = elsewhere.create("late", Permissions())
        now[0] = 1.0
        assert ring.find(text) == key
        elsewhere.revoke("late")
        now[0] = 2.0
        found = ring.find(text)
        assert found is not None
        assert found.state(time.time()) == "revoked"
        assert ring.num_active == 0


def test_keys_expire() -> None:
    key = ApiKey(
        id="1",
        name="n",
        digest=b"",
        permissions=Permissions(expires_at=100.0),
        created_at=0.0,
        revoked_at=None,
    )
    assert [key.state(now) for now in (99.9, 100.0)] == ["active", "expired"]
    assert dataclasses.replace(key, revoked_at=50.0).state(60.0) == "revoked"


def test_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, and long enough to have no header" * 20)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"notes\.txt: the key file cannot be used"):
        KeyStore(file)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot be used"):
        KeyStore(file / "below")


def test_ring_refuses_everybody_once_the_file_cannot_be_read(path: Path) -> None:
    now = [0.0]
    with KeyStore(path) as store:
        _, text = store.create("ci", Permissions())
        ring = KeyRing(store, clock=lambda: now[0])
        with sqlite3.connect(path) as vandal:
            vandal.execute("DROP TABLE keys")
        vandal.close()
        now[0] = 5.0
        with pytest.raises(ConfigError, match="cannot be used"):
            ring.find(text)


def test_a_file_from_before_there_was_a_limit_of_tokens_is_still_good(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "keys") as store:
        _, text = store.create("ci", Permissions(requests_per_minute=5))
    with closing(sqlite3.connect(tmp_path / "keys")) as database:
        database.execute("ALTER TABLE keys DROP COLUMN tokens_per_minute")
    with KeyStore(tmp_path / "keys") as store:
        key = KeyRing(store).find(text)
    assert key is not None
    assert key.permissions == Permissions(requests_per_minute=5)
