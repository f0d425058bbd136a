"""Entry of the ``rorqual`` command: one parser, exit codes, errors without tracebacks.

Exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted. With
``RORQUAL_DEBUG=1`` errors keep their traceback. Subcommands import what they need when they run,
so that ``--help`` is immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rorqual import __version__
from rorqual.cli import bench, chat, convert, cost, generate, inspect, keys, sandbox, serve, train
from rorqual.errors import RorqualError

_SUBCOMMANDS = (serve, keys, chat, generate, inspect, cost, bench, convert, train, sandbox)

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; the chosen subcommand's ``run`` is in ``args.run``."""
    parser = argparse.ArgumentParser(
        prog="rorqual",
        description="Run, talk to, inspect, convert and train DeepSeek-V4 networks.",
        epilog="Start with 'rorqual chat', or 'rorqual serve' and any OpenAI client.",
    )
    parser.add_argument("--version", action="version", version=f"rorqual {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage exits with 2 from argparse."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left. Keep the interpreter from complaining at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RorqualError as error:
        if os.environ.get("RORQUAL_DEBUG") == "1":
            raise
        print(f"rorqual: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
