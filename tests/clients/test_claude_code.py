"""Claude Code, headless: tool loops, tool search, images, token counts, compaction."""

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
    exports,
    tool_call,
)

ENVIRONMENT = exports("Claude Code")


def test_reads_a_file_and_answers_from_it(run_client: RunClient, tmp_path: Path) -> None:
    read = "Let me look.</think>" + tool_call("Read", file_path=f"{tmp_path}/work/notes.txt")
    outcome = run_client(
        ["claude", "-p", QUESTION],
        [(IS_KNOWN, FOUND), (QUESTION, read)],
        environment=ENVIRONMENT,
    )
    assert WORD in outcome.stdout
    first, second = answered(outcome, "/v1/messages")
    assert json.loads(first.body)["stream"] is True
    (result,) = json.loads(second.body)["messages"][-1]["content"]
    assert result["type"] == "tool_result"
    assert NOTES.strip() in result["content"]
    before, after = outcome.prompts
    assert "x-anthropic-billing-header" not in before
    # What was read and written stays the beginning of the prompt, so that the cache has it.
    assert after.startswith(before + read)
    assert NOTES.strip() in after[len(before) :]


def test_deferred_tools_images_and_failing_commands(run_client: RunClient, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pixel.png").write_bytes(PIXEL)
    search = tool_call("ToolSearch", query="select:NotebookEdit,CronList", max_results=5)
    look = tool_call("Read", file_path=f"{tmp_path}/work/pixel.png")
    fail = tool_call("Bash", command="cat notes.txt; exit 3")
    outcome = run_client(
        ["claude", "-p", QUESTION, "--model", "opus", "--allowedTools", "Bash,Read,ToolSearch"],
        [
            (IS_KNOWN, FOUND),
            ("[Unsupported Image]", "No.</think>" + fail),
            (search, "Now.</think>" + look),
            (QUESTION, "Let me look.</think>" + search),
        ],
        environment=ENVIRONMENT,
    )
    assert WORD in outcome.stdout
    requests = [json.loads(request.body) for request in answered(outcome, "/v1/messages")]
    assert len(requests) == 4
    assert all(body["model"].startswith("claude-") for body in requests)
    found = requests[1]["messages"][-1]["content"][0]["content"]
    assert {"type": "tool_reference", "tool_name": "CronList"} in found
    assert '{"name": "CronList"' in outcome.prompts[1]
    assert requests[3]["messages"][-1]["content"][0]["is_error"] is True


def test_counts_tokens_and_compacts(run_client: RunClient) -> None:
    replies = [("", "Short.</think><summary>They asked for a code word.</summary>")]
    asked = run_client(["claude", "-p", QUESTION], replies, environment=ENVIRONMENT)
    assert "They asked" in asked.stdout
    counted = run_client(["claude", "-p", "-c", "/context"], replies, environment=ENVIRONMENT)
    assert "Tokens" in counted.stdout
    counts = answered(counted, "/v1/messages/count_tokens")
    assert min(json.loads(count.answer)["input_tokens"] for count in counts) > 0
    compacted = run_client(["claude", "-p", "-c", "/compact"], replies, environment=ENVIRONMENT)
    assert answered(compacted, "/v1/messages")
