"""docs/operations.md: its commands run, its tables and examples are what the server does."""

from __future__ import annotations

import io
import json
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
from asgi_call import call, post

from rorqual.cli.main import build_parser, main
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.access_log import AccessLog
from rorqual.server.app import MAX_BODY_BYTES, MAX_REQUESTS, create_app
from rorqual.server.connection import Connection
from rorqual.server.run import DRAIN_S
from rorqual.testing.scripted_engine import ScriptedEngine

DOCUMENT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


def test_key_commands_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (block,) = blocks("bash")
    *commands, serving = block.splitlines()
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert "revoked" in capsys.readouterr().err
    assert main(shlex.split(serving)[1:]) == 1, "all keys are revoked"
    assert "refusing to listen" in capsys.readouterr().err


def test_logged_fields_are_those_of_the_example(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    file = io.BytesIO()
    log = AccessLog(file)
    app = create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card, access_log=log)
    post(app)
    log.flush()
    (line,) = blocks("json")
    example, logged = json.loads(line), json.loads(file.getvalue())
    assert {*example} - {"key", "trace_id"} == {*logged}
    assert {type(example[name]) for name in logged} == {type(logged[name]) for name in logged}


def test_metrics_table_is_what_is_exposed(tokenizer: Tokenizer, nano_card: ModelCard) -> None:
    app = create_app(ScriptedEngine(tokenizer, "ok"), tokenizer, nano_card)
    post(app)
    exposed = set(re.findall(r"^# TYPE (\w+)", call(app, "GET", "/metrics").text, re.MULTILINE))
    named = set(re.findall(r"`(rorqual_\w+)`", DOCUMENT))
    assert named == exposed | {"rorqual_kv_bytes"}  # a scripted engine has no cache


def test_limits_table_has_the_servers_values() -> None:
    for text in (
        f"{MAX_REQUESTS} | 503",
        f"{Connection.max_connections} | closed",
        f"{MAX_BODY_BYTES // 2**20} MiB | 413",
        f"{Connection.max_header_bytes // 1024} KiB, {Connection.header_timeout_s:g} s | 431",
        f"{Connection.write_timeout_s:g} s | closed, generation cancelled",
    ):
        assert text in DOCUMENT, text
    assert f"`--drain` seconds ({DRAIN_S:g})" in DOCUMENT


def test_service_file_starts_a_command_that_parses_and_leaves_time_to_drain() -> None:
    unit = ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    (block,) = blocks("ini")
    unit.read_string(block)
    command = shlex.split(unit["Service"]["ExecStart"])
    args = build_parser().parse_args(command[1:])
    assert int(unit["Service"]["TimeoutStopSec"]) > args.drain + 5
