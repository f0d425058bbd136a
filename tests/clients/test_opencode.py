"""OpenCode, headless: a tool loop over each of the three protocols."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import (
    FOUND,
    IS_KNOWN,
    NOTES,
    QUESTION,
    WORD,
    RunClient,
    answered,
    documented,
    tool_call,
)

PACKAGE = "@ai-sdk/openai-compatible"
QUIET = dict.fromkeys(
    (
        "OPENCODE_DISABLE_AUTOUPDATE",
        "OPENCODE_DISABLE_DEFAULT_PLUGINS",
        "OPENCODE_DISABLE_LSP_DOWNLOAD",
        "OPENCODE_DISABLE_MODELS_FETCH",
    ),
    "1",
)


def config(package: str) -> str:
    text = documented("OpenCode", "json")
    assert text.count(PACKAGE) == 1
    return text.replace(PACKAGE, package)


@pytest.mark.parametrize(
    ("package", "path"),
    [
        (PACKAGE, "/v1/chat/completions"),
        ("@ai-sdk/anthropic", "/v1/messages"),
        ("@ai-sdk/openai", "/v1/responses"),
    ],
)
def test_reads_a_file_and_answers_from_it(
    run_client: RunClient, tmp_path: Path, package: str, path: str
) -> None:
    read = "Let me look.</think>" + tool_call("read", filePath=f"{tmp_path}/work/notes.txt")
    outcome = run_client(
        ["opencode", "run", QUESTION],
        [
            ("You are a title generator", "Brief.</think>Code word"),
            (IS_KNOWN, FOUND),
            (QUESTION, read),
        ],
        environment=QUIET,
        files={"home/.config/opencode/opencode.json": config(package)},
    )
    assert WORD in outcome.stdout
    assert len(answered(outcome, path)) == 3
    before, after = [prompt for prompt in outcome.prompts if "title generator" not in prompt]
    assert after.startswith(before + read)
    assert NOTES.strip() in after[len(before) :]
