"""How a reply looks: reasoning dimmed, tool calls as cards; plain marked text on a pipe."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from rorqual.cli.session import Reply, ToolCall

_UNSAFE = dict.fromkeys(
    [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"],
    "\N{REPLACEMENT CHARACTER}",
)


def printable(text: str) -> str:
    """``text`` without control characters: a model may write any, but the terminal obeys none."""
    return text.translate(_UNSAFE)


class View:
    """Writes replies to ``out`` and remarks to ``err``."""

    def __init__(self, out: Console, err: Console) -> None:
        self._out = out
        self._err = err
        self._seconds = 0.0

    @classmethod
    def for_terminal(cls) -> View:
        """On standard output and standard error."""
        return cls(Console(highlight=False), Console(stderr=True, highlight=False))

    def show(self, reply: Reply) -> None:
        """Print ``reply`` while it is generated, then its tool calls."""
        started = time.monotonic()
        part = ""
        for delta in reply:
            for name, text in (("reasoning", delta.reasoning), ("content", delta.content)):
                if text:
                    self._enter(part, name)
                    part = name
                    self._write(text, dim=name == "reasoning")
            if delta.started_call:
                self._enter(part, "call")
                part = "call"
                if self._out.is_terminal:
                    self._write(f"calling {delta.started_call} …\n", dim=True)
        self._enter(part, "")
        self._seconds = time.monotonic() - started
        for call in reply.tool_calls:
            self._card(call)

    def usage(self, reply: Reply) -> None:
        """On a terminal, one dim line of counts; elsewhere only a warning where it was cut."""
        usage = reply.usage
        if reply.finish_reason == "length":
            self.note("(cut off at the length limit)")
        if not usage or not self._out.is_terminal:
            return
        completion = usage["completion_tokens"]
        self.note(
            f"{usage['prompt_tokens']:,} + {completion:,} tokens"
            f" · {completion / max(self._seconds, 1e-9):.1f} tokens/s, prompt included"
        )

    def stopped(self) -> None:
        """Say that the user stopped the answer."""
        self._write("\n", dim=False)
        self.note("(stopped)")

    def note(self, text: str) -> None:
        """A dim remark, not part of any answer; nothing on a pipe."""
        if self._err.is_terminal:
            self._err.print(Text(text, style="dim"))

    def error(self, text: str) -> None:
        """Something the user should know, always."""
        self._err.print(Text(f"error: {text}", style="red"), soft_wrap=True)

    def _enter(self, before: str, now: str) -> None:
        """Separate one part of a reply from the next; on a pipe reasoning stands between tags."""
        if before == now:
            return
        if before == "reasoning":
            self._write("\n" if self._out.is_terminal else "\n</think>\n", dim=False)
        elif before == "content":
            self._write("\n", dim=False)
        if now == "reasoning" and not self._out.is_terminal:
            self._write("<think>\n", dim=False)

    def _write(self, text: str, *, dim: bool) -> None:
        safe = Text(printable(text), style="dim italic" if dim else "")
        self._out.print(safe, end="", soft_wrap=True)

    def _card(self, call: ToolCall) -> None:
        try:
            body = json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False)
        except json.JSONDecodeError:
            body = call.arguments
        body, name = printable(body), printable(call.name)
        if not self._out.is_terminal:
            self._write(f"[tool call] {name} {printable(call.arguments)}\n", dim=False)
            return
        content = Syntax(body, "json", theme="ansi_dark", background_color="default")
        title = Text(f"tool call · {name}", style="bold")
        self._out.print(Panel(content, title=title, title_align="left", expand=False))
