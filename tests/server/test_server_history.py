"""The memory of turns is bounded, outlives the process in a file, and belongs to one owner."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.protocol.history import Call, Turn
from rorqual.server.history import History

TURN = Turn("why", "é", (Call("c", "f", '{"a": 1}'),), True, (1, 129_279, 3))


def test_what_is_remembered_is_found_under_every_key_by_its_owner_only() -> None:
    with History() as history:
        history.remember("me", ["a", "b"], TURN)
        assert history.find("me", ["x", "b"]) == history.of("me").find(["a"]) == TURN
        assert history.find("you", ["a", "b"]) is None
        assert history.find("me", []) is None
        newer = TURN._replace(content="new")
        history.of("me").remember(["a"], newer)
        assert history.find("me", ["a"]) == newer
        assert history.find("me", ["b"]) == TURN


def test_the_oldest_go_first_by_number_and_by_size() -> None:
    with History(max_turns=3) as history:
        for number in range(10):
            history.remember("", [str(number)], TURN)
        assert len(history) == 3
        found = [number for number in range(10) if history.find("", [str(number)])]
        assert found == [7, 8, 9]
    with History(max_bytes=5000) as history:
        for number in range(10):
            history.remember("", [str(number)], TURN._replace(content="x" * 1000))
        assert 1 <= len(history) < 5
        history.remember("", ["huge"], TURN._replace(content="x" * 9000))
        assert len(history) == 0


def test_a_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with History(path, max_turns=5) as history:
        history.remember("", ["a"], TURN)
    with History(path, max_turns=5) as history:
        assert history.find("", ["a"]) == TURN
        assert len(history) == 1


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"history\.db"):
        History(path)
    with pytest.raises(ConfigError, match="nowhere"):
        History(tmp_path / "nowhere" / "history.db")


def test_a_memory_that_fails_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    history = History()
    history.close()
    history.remember("", ["a"], TURN)
    assert "could not be remembered" in caplog.text
