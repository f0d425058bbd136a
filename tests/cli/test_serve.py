"""``rorqual serve`` as a process: it announces itself, answers, and stops when told to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rorqual.cli.main import main


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_announces_answers_and_stops_when_told(model_dir: Path, stop: signal.Signals) -> None:
    argv = ["serve", str(model_dir), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rorqual.cli.main", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        announced = ""
        while "curl" not in announced and (line := process.stdout.readline()):
            announced += line
        url = re.search(r"http://127\.0\.0\.1:\d+", announced)
        assert url is not None, process.communicate(timeout=10)[1]
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
        }
        request = urllib.request.Request(
            f"{url[0]}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["finish_reason"] == "length"
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        assert err.count("tiny runs on ") == 1
        assert err.endswith("stopped\n"), "the engine was closed first"
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_impossible_limits_are_explained(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["serve", str(model_dir), "--max-batch", "8", "--step-tokens", "8"]
    assert main(argv) == 1
    assert "max_step_tokens must be > max_running 8" in capsys.readouterr().err
