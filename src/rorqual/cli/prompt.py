"""Reading the user's lines: an editor with history on a terminal, plain lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from rorqual.errors import ConfigError


def lines(
    label: Callable[[], str], commands: Mapping[str, Sequence[str]], toolbar: Callable[[], str]
) -> Iterator[str]:
    """What the user enters, until the end of input. Ctrl-C empties the line.

    Args:
        label: shown before each line.
        commands: completed with Tab, with the words that may follow; a command without any takes
            a path.
        toolbar: shown below the line.
    """
    if not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input is not UTF-8 text: {error.reason}") from None
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter, WordCompleter
    from prompt_toolkit.styles import Style

    options = {
        name: WordCompleter(list(words)) if words else PathCompleter(expanduser=True)
        for name, words in commands.items()
    }
    session: PromptSession[str] = PromptSession(
        completer=NestedCompleter(dict(options)),
        complete_while_typing=False,
        bottom_toolbar=toolbar,
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
    )
    while True:
        try:
            yield session.prompt(label())
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
