"""Codex, headless: tool loops over Responses, images and the compaction of a long history."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import (
    FOUND,
    IS_KNOWN,
    NOTES,
    PIXEL,
    QUESTION,
    WORD,
    RunClient,
    answered,
    documented,
    tool_call,
)

CONFIG = documented("Codex", "toml")
KEY = {"RORQUAL_KEY": "any"}
COMMAND = ["codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", QUESTION]


def test_runs_a_command_and_answers_from_its_output(run_client: RunClient) -> None:
    run = "Let me look.</think>" + tool_call("exec_command", cmd="cat notes.txt")
    outcome = run_client(
        COMMAND,
        [(IS_KNOWN, FOUND), (QUESTION, run)],
        environment=KEY,
        files={"home/.codex/config.toml": CONFIG},
    )
    assert WORD in outcome.stdout
    first, second = answered(outcome, "/v1/responses")
    sent = json.loads(first.body)
    assert sent["include"] == ["reasoning.encrypted_content"]
    assert {tool["type"] for tool in sent["tools"]} >= {"function", "namespace"}
    items = json.loads(second.body)["input"][-3:]
    assert [item["type"] for item in items] == [
        *("reasoning", "function_call", "function_call_output")
    ]
    assert items[0]["encrypted_content"]
    assert NOTES.strip() in items[2]["output"]
    before, after = outcome.prompts
    assert "multi_agent_v1__" in before
    assert after.startswith(before + run)
    assert NOTES.strip() in after[len(before) :]


def test_looks_at_an_image_and_goes_on_after_compaction(
    run_client: RunClient, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pixel.png").write_bytes(PIXEL)
    outcome = run_client(
        COMMAND,
        [
            (IS_KNOWN, FOUND),
            ("CONTEXT CHECKPOINT", "Short.</think>Still to do: read the notes"),
            ("Still to do", "Again.</think>" + tool_call("exec_command", cmd="cat notes.txt")),
            (QUESTION, "Look.</think>" + tool_call("view_image", path="pixel.png")),
        ],
        environment=KEY,
        files={"home/.codex/config.toml": "model_auto_compact_token_limit = 2000\n" + CONFIG},
    )
    assert WORD in outcome.stdout
    assert len(answered(outcome, "/v1/responses")) >= 4
    compacted = next(prompt for prompt in outcome.prompts if "CONTEXT CHECKPOINT" in prompt)
    assert "[Unsupported Image]" in compacted
