"""``rorqual generate``, on a real (random) checkpoint and on scripted answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from scripted_sessions import ScriptedSession

from rorqual.cli.generate import request_body
from rorqual.cli.main import build_parser, main


def run(model_dir: Path, *more: str) -> int:
    return main(["generate", "--model", str(model_dir), "--threads", "1", *more])


def test_text_goes_to_stdout_and_the_cut_is_reported(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_dir, "Hello there", "--max-tokens", "5") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "cut off at max_tokens" in err
    assert run(model_dir, "Hello there", "--context", "10") == 0
    assert "cut off at the end of --context, 10" in capsys.readouterr().err


def test_json_is_a_chat_completions_object(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_dir, "Hello there", "--json", "--max-tokens", "5") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] > 0
    assert answer["choices"][0]["finish_reason"] == "length"


def test_seed_repeats_the_answer(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert run(model_dir, "Hi", "--temperature", "1", "--seed", seed, "--max-tokens", "12") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_prompt_and_document_come_from_pipe_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("First text.\n", "utf-8")
    second.write_text("Second text.\n", "utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    argv = ["generate", "--doc", str(first), "--doc", str(second), "--mode", "think"]
    body = request_body(build_parser().parse_args([*argv, "--system", "Be brief.", "--top-k", "3"]))
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    text = user["content"]
    assert text.index("First text.") < text.index("Second text.") < text.index("What is it?")
    assert text.endswith("What is it?")
    assert body["thinking"] == {"type": "enabled"}
    assert body["top_k"] == 3
    assert "temperature" not in body


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--doc", "missing.txt"], "missing.txt: No such file"),
        (["x", "--tools", "missing.json"], "missing.json: No such file"),
        (["x", "--temperature", "9"], "temperature"),
        (["x", "--context", "999999999"], "--context"),
        ([""], "the prompt is empty"),
        (["hello " * 3000], "maximum context length is 2048 tokens"),
    ],
)
def test_mistakes_are_explained(
    model_dir: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_dir, *argv) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_input_that_is_not_utf8_is_explained(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert run(model_dir) == 1
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("depth", [200, 100_000])
def test_tools_nested_too_deeply_are_explained(
    model_dir: Path, tmp_path: Path, depth: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "f", "parameters": ' + '{"a":' * depth + "1" + "}" * depth + "}]")
    assert run(model_dir, "x", "--tools", str(tools)) == 1
    assert "nest" in capsys.readouterr().err


def test_reply_collects_reasoning_content_and_whole_calls(scripted: ScriptedSession) -> None:
    call = (
        "Look it up.</think>One moment.\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="lookup">\n'
        '<｜DSML｜parameter name="key" string="true">x</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
    body = {
        "messages": [{"role": "user", "content": "?"}],
        "thinking": {"type": "enabled"},
        "tools": [tool],
    }
    with scripted([call]) as session:
        reply = session.ask(body)
        deltas = list(reply)
        whole = json.loads(session.complete(body, 0))["choices"][0]["message"]
    assert "".join(d.reasoning for d in deltas) == reply.reasoning == "Look it up."
    assert "".join(d.content for d in deltas) == reply.content == "One moment."
    assert [d.started_call for d in deltas if d.started_call] == ["lookup"]
    assert reply.finish_reason == "tool_calls"
    (made,) = reply.tool_calls
    assert (made.name, json.loads(made.arguments)) == ("lookup", {"key": "x"})
    message = reply.message()
    assert message["content"] == whole["content"]
    assert message["reasoning_content"] == whole["reasoning_content"]
    assert message["tool_calls"][0]["function"] == whole["tool_calls"][0]["function"], (
        "streamed and whole agree"
    )


def test_stop_string_ends_an_endless_answer_and_frees_the_engine(
    scripted: ScriptedSession,
) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "stop": ["END"], "max_tokens": 1500}
    with scripted(["alpha beta END gamma …"]) as session:
        reply = session.ask(body)
        list(reply)
        assert reply.content == "alpha beta "
        assert reply.finish_reason == "stop"
        reply.cancel()
        assert session.engine.stats().num_running == 0
