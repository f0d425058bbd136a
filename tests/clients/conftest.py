"""Runs published command-line clients where there is no network; skips where one is missing.

``make clients`` installs them below ``.clients``; others on the PATH serve as well.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from isolated import Exchange, Outcome, Scenario

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".clients" / "node_modules" / ".bin"
WORD = "kingfisher"
QUESTION = "Which code word is in notes.txt?"
NOTES = f"The code word is {WORD}.\n"
FOUND = f"I read it.</think>The word is {WORD}."
IS_KNOWN = f"is {WORD}"
"""What a prompt holds once the file has been read."""
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A picture."""
APART = ("unshare", "--net", "--map-root-user")

RunClient = Callable[..., Outcome]


@pytest.fixture
def run_client(tmp_path: Path) -> RunClient:
    """``run_client(words, replies, environment=..., files=...)``: words[0] names the client.

    The client starts in ``work``, beside its home directory ``home``; ``work/notes.txt`` holds the
    code word. ``files`` are relative to both.
    """

    def run(
        words: list[str],
        replies: list[tuple[str, str]],
        *,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Outcome:
        program = _found(words[0])
        (tmp_path / "home").mkdir(exist_ok=True)
        scenario = Scenario(
            command=[program, *words[1:]],
            environment={
                "HOME": str(tmp_path / "home"),
                "PATH": os.environ["PATH"],
                "LANG": "C.UTF-8",
                **(environment or {}),
            },
            folder=str(tmp_path / "work"),
            files={
                str(tmp_path / name): text
                for name, text in {"work/notes.txt": NOTES, **(files or {})}.items()
            },
            replies=replies,
        )
        done = subprocess.run(
            [*APART, sys.executable, str(Path(__file__).with_name("isolated.py"))],
            input=json.dumps(asdict(scenario)),
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        assert done.returncode == 0, done.stderr
        fields: dict[str, Any] = json.loads(done.stdout)
        requests = [Exchange(**request) for request in fields.pop("requests")]
        outcome = Outcome(**fields, requests=requests)
        assert outcome.status == 0, f"{outcome.stdout}\n{outcome.stderr}"
        return outcome

    return run


def documented(heading: str, language: str) -> str:
    """The block in ``language`` under ``heading`` of docs/clients.md, for ``Scenario``'s server."""
    text = (ROOT / "docs" / "clients.md").read_text("utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return str(block).replace("http://127.0.0.1:8000", "$URL")


def exports(heading: str) -> dict[str, str]:
    """The variables that the shell block under ``heading`` sets."""
    return dict(re.findall(r"^export (\w+)=(.*)$", documented(heading, "bash"), re.MULTILINE))


def _found(name: str) -> str:
    program = shutil.which(name, path=str(INSTALLED)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed; 'make clients' does it")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need unshare and ip")
    if subprocess.run([*APART, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    return program


def tool_call(name: str, **arguments: Any) -> str:
    """What the model writes to call a tool, up to the end of its turn."""
    parameters = "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    )
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{parameters}'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


def answered(outcome: Outcome, path: str) -> list[Exchange]:
    """The requests to ``path``, all of which must have been answered with 200."""
    found = [request for request in outcome.requests if request.path.split("?")[0] == path]
    assert [request.status for request in found] == [200] * len(found)
    return found
