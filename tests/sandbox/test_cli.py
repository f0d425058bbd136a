"""``rorqual sandbox`` as a user types it: what it prints, returns, and says about mistakes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.cli.main import main
from rorqual.errors import SubstrateMissingError
from rorqual.sandbox.container.runtime import find_runtime
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.saved import saved_machines
from rorqual.sandbox.trajectory.log import TrajectoryLog

DOCUMENT = Path(__file__).parents[2] / "docs" / "sandbox.md"


@pytest.fixture
def no_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


def test_the_documents_function_calls_say_what_it_claims(
    root: Path,
    tmp_path: Path,
    no_input: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = re.search(
        r"^```bash\n(.*?--substrate function.*?)^```$", DOCUMENT.read_text(), re.M | re.S
    )
    assert found is not None
    monkeypatch.chdir(tmp_path)
    Path("prices.csv").write_text("apple,3\npear,4\n")
    lines = found[1].splitlines()
    assert len(lines) >= 3
    for line in lines:
        command, _, answer = line.partition(" # ")
        words = shlex.split(command)
        assert words[:2] == ["rorqual", "sandbox"]
        assert main(["sandbox", "--root", str(root), *words[2:]]) == 0, capfd.readouterr().err
        assert capfd.readouterr().out.strip() == answer.strip(), line


def test_functions_answer_and_mistakes_are_one_line(
    root: Path, no_input: None, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:

    def said(*words: str) -> tuple[int, bytes, bytes]:
        code = main(["sandbox", "--root", str(root), "run", *words])
        return code, *capfdbinary.readouterr()

    function = ("--substrate", "function", "--")
    assert said(*function, "js", "-e", "print(6 * 7)") == (0, b"42\n", b"")
    for words, expected in (
        ((*function, "js", "/data/none.js"), b"'/data/none.js': No such file or directory"),
        ((*function, "ls"), b"functions run js"),
        (("--image", "none", "--", "true"), b"sandbox image ls"),
        (("--substrate", "vm", "--image", "none.raw", "--", "true"), b"none.raw' is not a file"),
    ):
        code, out, err = said(*words)
        if b"is not installed" in err:
            continue
        assert code != 0
        assert out == b""
        assert expected in err
        assert err.count(b"\n") == 1


def test_a_pipe_that_stays_open_is_not_waited_for(root: Path) -> None:
    try:
        find_runtime(None)
    except SubstrateMissingError as error:
        pytest.skip(str(error))
    command = [
        sys.executable,
        "-m",
        "rorqual.cli.main",
        "sandbox",
        "--root",
        str(root),
        "run",
        "--",
    ]
    with subprocess.Popen(
        [*command, "head", "-n1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        assert process.stdout.read() == b"one\n"


def test_snapshots_of_machines_are_listed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("templates/machine-1a", "templates/2b", "machines/vm-3c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "memory").write_bytes(b"x" * 5000)
    command = ["sandbox", "--root", str(tmp_path), "image"]
    assert main([*command, "ls"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(names) == ["machine-1a", "vm-3c"]  # a template is no snapshot
    assert main([*command, "rm", *names]) == 0
    assert saved_machines(Layout(tmp_path)) == []
    assert (tmp_path / "templates" / "2b").exists()
    assert main([*command, "rm", "vm-3c"]) != 0
    assert "there is no image 'vm-3c'" in capsys.readouterr().err


def test_functions_replay_no_trajectory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    TrajectoryLog(file).close()
    assert main(["sandbox", "replay", str(file), "any", "--substrate", "function"]) != 0
    assert "functions run calls" in capsys.readouterr().err
