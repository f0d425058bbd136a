"""``rorqual keys``: what it prints, where, and what it refuses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rorqual.cli.main import main
from rorqual.server.keys import KeyRing, KeyStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite3"


def keys(file: Path, *words: str) -> int:
    return main(["keys", *words, "--key-file", str(file)])


def test_created_key_is_alone_on_stdout_and_works(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["create", "ci", "--models", "a, b", "--modes", "think,non-think"]
    assert (
        keys(
            file,
            *argv,
            "--requests-per-minute",
            "60",
            "--tokens-per-minute",
            "9000",
            "--concurrent",
            "4",
        )
        == 0
    )
    out, err = capsys.readouterr()
    text = out.removesuffix("\n")
    assert text not in err
    with KeyStore(file) as store:
        key = KeyRing(store).find(text)
    assert key is not None
    assert key.name == "ci"
    assert key.permissions.models == {"a", "b"}
    assert key.permissions.modes == {"think", "non-think"}
    assert (key.permissions.requests_per_minute, key.permissions.max_concurrent) == (60, 4)
    assert key.permissions.tokens_per_minute == 9000
    assert key.permissions.expires_at is None


def test_list_shows_every_key_and_no_secret(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(file, "create", "ci", "--expires", "12h", "--modes", "think") == 0
    secret = capsys.readouterr().out.strip().split("_")[2]
    assert keys(file, "create", "open", "--requests-per-minute", "9") == 0
    assert keys(file, "revoke", "open") == 0
    capsys.readouterr()
    assert keys(file, "list") == 0
    out = capsys.readouterr().out
    first, second = (line for line in out.splitlines() if "active" in line or "revoked" in line)
    assert "ci" in first.split()
    assert "think" in first.split()
    assert "revoked" in second
    assert "9/min" in second
    assert "everything" in second
    assert secret not in out


def test_expiry_counts_from_now(file: Path) -> None:
    before = time.time()
    assert keys(file, "create", "ci", "--expires", "90m") == 0
    with KeyStore(file) as store:
        expires_at = store.list()[0].permissions.expires_at
    assert expires_at is not None
    assert before + 5400 <= expires_at <= time.time() + 5400


@pytest.mark.parametrize(
    "wrong",
    [
        ["--expires", "soon"],
        ["--expires", "0d"],
        ["--modes", "fast"],
        ["--models", ","],
        ["--requests-per-minute", "0"],
    ],
)
def test_wrong_usage_makes_no_key(file: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        keys(file, "create", "ci", *wrong)
    assert ended.value.code == 2
    assert not file.exists()


def test_unknown_key_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(file, "revoke", "nobody") == 1
    assert "no active key 'nobody'" in capsys.readouterr().err


def test_default_file_is_in_the_users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main(["keys", "create", "ci"]) == 0
    assert (tmp_path / "data" / "rorqual" / "keys.sqlite3").is_file()


def test_serving_elsewhere_without_keys_is_refused_before_the_model_loads(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["serve", "no-such-model", "--host", "0.0.0.0", "--key-file", str(file)]
    assert main(argv) == 1
    assert "refusing to listen on 0.0.0.0" in capsys.readouterr().err
    assert keys(file, "create", "ci") == 0
    assert main(argv) == 1
    assert "no model 'no-such-model'" in capsys.readouterr().err
