"""The command as a whole: help, exit codes, errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rorqual.cli import inspect, options
from rorqual.cli.main import build_parser, main
from rorqual.errors import ConfigError
from rorqual.protocol import modes


def test_help_is_built_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from rorqual.cli.main import build_parser; build_parser().format_help();"
        "heavy = {'torch', 'rich', 'prompt_toolkit', 'starlette', 'msgspec'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["serve", "chat", "generate", "convert", "inspect", "train", ""]
)
def test_help_explains_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: rorqual" in out
    assert len(out.splitlines()) > 10


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["generate", "x", "--max-tokens", "0"],
        ["chat", "--mode", "dream"],
        ["convert", "a", "b"],
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: rorqual" in capsys.readouterr().err


def test_error_is_one_line_on_stderr_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RORQUAL_DEBUG", raising=False)
    assert main(["generate", "hello", "--model", "no-such-model"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rorqual: error: no model 'no-such-model'")
    assert len(err.splitlines()) == 1


def test_debug_variable_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["generate", "hello", "--model", "no-such-model"])


def test_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert main(["inspect", "tiny"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_modes_and_generations_offered_are_the_protocols() -> None:
    assert options.MODES == modes.MODES
    assert get_args(modes.Generation) == options.GENERATIONS


def test_every_command_has_a_run_function() -> None:
    for argv in (["serve"], ["chat"], ["generate"], ["inspect"], ["train", "runs/x"]):
        assert callable(build_parser().parse_args(argv).run)


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rorqual.cli.main", "generate", "x", "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no config.json" in done.stderr
    assert "Traceback" not in done.stderr
