"""Runs a command-line client against a scripted server where there is no network but loopback.

A program, to be started in a network namespace of its own (``unshare --net``); it reads a
``Scenario`` as JSON from standard input and writes an ``Outcome`` to standard output. The server
is the one ``rorqual serve`` runs, on a real socket; only the engine behind it is scripted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.engine.request import Request
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import create_app
from rorqual.server.run import listen, server_for, url_of
from rorqual.testing.scripted_engine import ScriptedEngine

NANO = Path(__file__).parents[2] / "models" / "nano-flash"
CARD = ModelCard(name="deepseek-v4-flash", generation="ga", context_length=1_048_576)
"""As a large checkpoint's: the prompts of these clients have 10,000 to 50,000 tokens."""


@dataclass(kw_only=True)
class Scenario:
    """What to run, and what the model says."""

    command: list[str]
    """``$URL`` in an argument, a file or the environment stands for the server's address."""
    environment: Mapping[str, str]
    """The whole of it."""
    folder: str
    """Working directory."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path -> text, written before the start."""
    replies: list[tuple[str, str]]
    """The answer belongs to the first text that the prompt contains."""
    timeout_s: float = 60.0


@dataclass(kw_only=True)
class Outcome:
    """What the client said and what the server saw."""

    status: int
    stdout: str
    stderr: str
    prompts: list[str]
    requests: list[Exchange]


@dataclass(kw_only=True)
class Exchange:
    """One HTTP request and how it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int = 0
    answer: str = ""


class Recorder:
    """ASGI middleware that keeps every exchange whole."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope["query_string"].decode()
        seen = Exchange(
            method=scope["method"],
            path=scope["path"] + (f"?{query}" if query else ""),
            headers={name.decode(): value.decode("latin-1") for name, value in scope["headers"]},
            body="",
        )
        self.exchanges.append(seen)

        async def received() -> Message:
            message = await receive()
            seen.body += message.get("body", b"").decode("utf-8", "replace")
            return message

        async def sent(message: Message) -> None:
            seen.status = message.get("status", seen.status)
            seen.answer += message.get("body", b"").decode("utf-8", "replace")
            await send(message)

        await self._app(scope, received, sent)


def run(scenario: Scenario) -> Outcome:
    """Serve, run the client to its end, stop serving."""
    tokenizer = Tokenizer.from_dir(NANO)
    prompts: list[str] = []

    def script(request: Request) -> str:
        prompts.append(prompt := tokenizer.decode(request.prompt_ids))
        return next(text for words, text in scenario.replies if words in prompt)

    with ScriptedEngine(tokenizer, script) as engine, listen("127.0.0.1", 0) as listener:
        app = create_app(engine, tokenizer, CARD)
        recorder = Recorder(app)
        server = server_for(app, drain_s=2.0)
        server.config.app = recorder
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        try:
            status, stdout, stderr = _client(scenario, url_of(listener))
        finally:
            server.should_exit = True
            serving.join(20)
    return Outcome(
        status=status, stdout=stdout, stderr=stderr, prompts=prompts, requests=recorder.exchanges
    )


def _client(scenario: Scenario, url: str) -> tuple[int, str, str]:
    for path, text in scenario.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text.replace("$URL", url), "utf-8")
    process = subprocess.Popen(
        [word.replace("$URL", url) for word in scenario.command],
        cwd=scenario.folder,
        env={name: value.replace("$URL", url) for name, value in scenario.environment.items()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=scenario.timeout_s)
        return process.returncode, stdout, stderr
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        return 124, stdout, stderr + f"\n(ended after {scenario.timeout_s:g} s)"


def main() -> None:
    """Standard input to standard output."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    fields: dict[str, Any] = json.load(sys.stdin)
    json.dump(asdict(run(Scenario(**fields))), sys.stdout)


if __name__ == "__main__":
    main()
