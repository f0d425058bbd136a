"""``rorqual chat``: what a user sees and what the model is sent, with scripted answers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from scripted_sessions import ScriptedSession

from rorqual.cli.chat import Chat
from rorqual.cli.conversation import Conversation
from rorqual.cli.main import main
from rorqual.cli.session import Session
from rorqual.cli.view import View, printable
from rorqual.errors import RequestError

CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="get_time">\n'
    '<｜DSML｜parameter name="zone" string="true">CET</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "get_time")
]


class Terminal:
    """Two consoles whose text a test can read."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.view = View(
            Console(file=self.out, force_terminal=is_terminal, width=80, highlight=False),
            Console(file=self.err, force_terminal=is_terminal, width=80, highlight=False),
        )


def talk(
    session: Session,
    lines: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_terminal: bool = False,
    tools: list[dict[str, object]] | None = None,
) -> tuple[int, Terminal, Conversation]:
    """Feed ``lines`` to a chat and return its exit code, screen and conversation."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    terminal = Terminal(is_terminal=is_terminal)
    conversation = Conversation(
        session, mode="non-think", system=None, tools=tools or [], fields={}
    )
    return Chat(conversation, terminal.view).loop(), terminal, conversation


def test_piped_lines_are_answered_in_order_with_memory(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(["Hello!", "You said hi."]) as session:
        code, terminal, conversation = talk(session, "hi\n\nwhat did I say?\n", monkeypatch)
    assert code == 0
    assert terminal.out.getvalue() == "Hello!\nYou said hi.\n"
    assert terminal.err.getvalue() == ""
    assert [m["content"] for m in conversation.messages] == [
        "hi",
        "Hello!",
        "what did I say?",
        "You said hi.",
    ]


def test_reasoning_stands_between_tags_on_a_pipe(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(["Easy.</think>Four."]) as session:
        _, terminal, _ = talk(session, "/mode think\n2 + 2?\n", monkeypatch)
    assert terminal.out.getvalue() == "<think>\nEasy.\n</think>\nFour.\n"


def test_reasoning_is_dimmed_on_a_terminal(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(["Easy.</think>Four."]) as session:
        _, terminal, _ = talk(session, "/mode think\n2 + 2?\n", monkeypatch, is_terminal=True)
    out = terminal.out.getvalue()
    dim, _, rest = out.partition("Four.")
    assert re.sub(r"\x1b\[2;3m(.*?)\x1b\[0m", r"\1", dim) == "Easy.\n", "dim to the last letter"
    assert dim.startswith("\x1b[2;3m")
    assert rest == "\n"
    assert "tokens/s" in terminal.err.getvalue()


def test_modes_switch_what_the_model_is_asked_for(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(["a</think>b", "c"]) as session:
        code, terminal, conversation = talk(
            session, "/mode think-max\nx\n/mode non-think\ny\n/mode dream\n", monkeypatch
        )
    assert terminal.out.getvalue() == "<think>\na\n</think>\nb\nc\n"
    assert conversation.mode == "non-think"
    assert "no mode 'dream'" in terminal.err.getvalue()
    assert code == 1, "a failed line on a pipe"


def test_tool_calls_become_cards_and_their_results_are_asked_for(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted([CALL, "Sunny at noon."]) as session:
        _, terminal, conversation = talk(
            session,
            'weather in Oslo?\n{"sky": "sunny"}\n12:00\n',
            monkeypatch,
            is_terminal=True,
            tools=TOOLS,
        )
    out = terminal.out.getvalue()
    assert "tool call · get_weather" in out
    assert "Oslo" in out
    assert "tool call · get_time" in out
    assert "DSML" not in out
    assert "Sunny at noon." in out
    roles = [m["role"] for m in conversation.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    first, second = conversation.messages[2:4]
    calls = conversation.messages[1]["tool_calls"]
    assert [first["tool_call_id"], second["tool_call_id"]] == [call["id"] for call in calls]
    assert first["content"] == '{"sky": "sunny"}'


def test_prompt_names_the_tool_whose_result_is_due(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted([CALL]) as session:
        _, terminal, conversation = talk(session, "weather?\n", monkeypatch, tools=TOOLS)
        assert conversation.label() == "result of get_weather> "
        assert conversation.give_result("fine") is None
        assert conversation.label() == "result of get_time> "
    assert "[tool call] get_weather" in terminal.out.getvalue()


def test_document_goes_into_the_next_message_only(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "facts.txt"
    file.write_text("The code is 7.\n", "utf-8")
    with scripted(["7", "ok"]) as session:
        _, _, conversation = talk(session, f"/doc {file}\nWhat code?\nThanks\n", monkeypatch)
    first, _, second, _ = conversation.messages
    assert first["content"] == "<document>\nThe code is 7.\n</document>\n\nWhat code?"
    assert second["content"] == "Thanks"


def test_failed_message_is_explained_and_leaves_the_conversation_as_it_was(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(["first", "second"]) as session:
        code, terminal, conversation = talk(
            session, "one\n" + "word " * 5000 + "\ntwo\n/nothing\n", monkeypatch
        )
    assert code == 1
    err = terminal.err.getvalue()
    assert "maximum context length" in err
    assert "unknown command /nothing" in err
    assert [m["content"] for m in conversation.messages] == ["one", "first", "two", "second"]


def test_reset_starts_over(scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(["one"]) as session:
        _, terminal, conversation = talk(session, "a\n/reset\nb\n/exit\nc\n", monkeypatch)
    assert terminal.out.getvalue() == "one\none\n"
    assert [m["content"] for m in conversation.messages] == ["b", "one"]


def test_stopped_answer_is_kept_as_far_as_it_came(scripted: ScriptedSession) -> None:
    with scripted(["and so on …", "fine"]) as session:
        conversation = Conversation(
            session, mode="non-think", system=None, tools=[], fields={"max_tokens": 1500}
        )
        with conversation.say("go") as reply:
            for delta in reply:
                if "on" in delta.content:
                    break
            reply.cancel()
        assert session.engine.stats().num_running == 0
        assert reply.finish_reason is None
        with conversation.say("ok?") as answer:
            list(answer)
    assert conversation.messages[1]["content"].startswith("and so on")
    assert conversation.messages[3]["content"] == "fine"


def test_error_in_an_exchange_cancels_it_and_keeps_documents(scripted: ScriptedSession) -> None:
    with scripted(["never ends …"]) as session:
        conversation = Conversation(
            session, mode="non-think", system=None, tools=[], fields={"max_tokens": 1500}
        )
        conversation.attach("paper")

        def fail() -> None:
            with conversation.say("go") as reply:
                next(iter(reply))
                raise RequestError("the screen is gone")

        with pytest.raises(RequestError):
            fail()
        assert session.engine.stats().num_running == 0
    assert conversation.messages == []
    assert conversation.documents == ["paper"]


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9bc\r\x07\n\td") == "a�[2Jb�c��\n\td"


def test_chat_runs_from_a_pipe_on_a_real_checkpoint(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", str(model_dir), "--threads", "1", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert len(out.strip()) > 0
    assert err == ""


def test_bare_function_objects_are_accepted_as_tools(
    scripted: ScriptedSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([tool["function"] for tool in TOOLS]), "utf-8")
    with scripted([CALL]) as session:
        _, _, conversation = talk(session, f"/tools {file}\nweather?\n", monkeypatch)
    assert conversation.tools == TOOLS
    assert conversation.awaits_result
