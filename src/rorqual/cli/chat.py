"""``rorqual chat``: a conversation in the terminal, or over a pipe with one message per line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.options import (
    MODES,
    add_loading_options,
    add_model_argument,
    add_prompt_options,
    loading_fields,
    read_text,
    read_tools,
    wire_fields,
)
from rorqual.cli.progress import status
from rorqual.cli.prompt import lines
from rorqual.errors import RorqualError

if TYPE_CHECKING:
    from rorqual.cli.conversation import Conversation
    from rorqual.cli.view import View

_COMMANDS = """\
/mode [non-think|think|think-max]  show or switch the reasoning mode
/doc FILE                          paste a document into the next message
/tools FILE                        declare tools (JSON, OpenAI's format); without FILE, none
/reset                             start a new conversation
/help                              this text
/exit                              leave (or Ctrl-D)
Ctrl-C stops the answer; an answer you stop stays in the conversation as far as it came.
When the model calls a tool, type the tool's result."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model. Reasoning is dimmed, tool calls are shown as cards. On a "
        "pipe every line of input is a message or a command.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    parser.add_argument("--doc", type=Path, metavar="FILE", help="paste a document first")
    add_loading_options(parser)
    add_prompt_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; 1 if input was piped and a message failed."""
    with status("Starting"):
        from rorqual.cli.conversation import Conversation
        from rorqual.cli.loading import open_session
        from rorqual.cli.view import View

    tools = read_tools(args.tools) if args.tools else []
    document = read_text(args.doc) if args.doc else None
    view = View.for_terminal()
    with open_session(**loading_fields(args)) as session:
        conversation = Conversation(
            session,
            mode=args.mode or session.card.default_mode,
            system=args.system,
            tools=tools,
            fields=wire_fields(args),
        )
        if document is not None:
            conversation.attach(document)
        view.note(
            f"{session.card.name} on {session.device}, mode {conversation.mode}. "
            "/help lists the commands."
        )
        return Chat(conversation, view).loop()


class Chat:
    """The loop: read a line, obey a command or send a message, show the reply."""

    def __init__(self, conversation: Conversation, view: View) -> None:
        self._conversation = conversation
        self._view = view
        self._is_interactive = sys.stdin.isatty()
        self._failed = False
        self._commands = {
            "/mode": self._mode,
            "/doc": self._doc,
            "/tools": self._tools,
            "/reset": self._reset,
            "/help": self._help,
        }

    def loop(self) -> int:
        """Until the input ends or ``/exit``; 1 if input is piped and anything failed."""
        words = dict.fromkeys(self._commands, ()) | {"/mode": MODES}
        for line in lines(self._conversation.label, words, self._toolbar):
            text = line.strip()
            if text == "/exit":
                break
            if text or self._conversation.awaits_result:
                self._handle(text)
        return 1 if self._failed and not self._is_interactive else 0

    def _handle(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        try:
            if name in self._commands:
                self._commands[name](argument.strip())
            elif self._conversation.awaits_result:
                self._send(text, is_result=True)
            elif name.startswith("/") and "/" not in name[1:]:
                self._view.error(f"unknown command {name}; /help lists them")
                self._failed = True
            else:
                self._send(text, is_result=False)
        except RorqualError as error:
            self._view.error(str(error))
            self._failed = True

    def _send(self, text: str, *, is_result: bool) -> None:
        conversation = self._conversation
        exchange = conversation.give_result(text) if is_result else conversation.say(text)
        if exchange is None:
            return
        with exchange as reply:
            try:
                self._view.show(reply)
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                reply.cancel()
                self._view.stopped()
        self._view.usage(reply)

    def _toolbar(self) -> str:
        conversation = self._conversation
        return (
            f" {conversation.session.card.name} · {conversation.mode} · "
            f"{conversation.num_tokens:,} of {conversation.session.context_tokens:,} tokens"
        )

    # ---- commands -----------------------------------------------------------------------------
    def _mode(self, argument: str) -> None:
        if argument:
            self._conversation.set_mode(argument)
        self._view.note(f"mode {self._conversation.mode}")

    def _doc(self, argument: str) -> None:
        text = read_text(Path(argument).expanduser())
        self._conversation.attach(text)
        self._view.note(f"{len(text):,} characters go into your next message")

    def _tools(self, argument: str) -> None:
        self._conversation.tools = read_tools(Path(argument).expanduser()) if argument else []
        count = len(self._conversation.tools)
        self._view.note(f"{count} tool{'' if count == 1 else 's'} declared")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._view.note("new conversation")

    def _help(self, _: str) -> None:
        self._view.note(_COMMANDS)
