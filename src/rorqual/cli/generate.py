"""``rorqual generate``: one prompt in, one answer out; made for pipes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rorqual.cli.options import (
    add_loading_options,
    add_model_option,
    add_prompt_options,
    loading_fields,
    read_text,
    read_tools,
    wire_fields,
    with_document,
)
from rorqual.cli.progress import status
from rorqual.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt. The answer goes to standard output as it comes, tool "
        "calls as one JSON line each; on a terminal, reasoning goes to standard error, dimmed.",
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; without it, or -, read from stdin")
    parser.add_argument(
        "--doc", type=Path, action="append", metavar="FILE", help="paste a document; repeatable"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a Chat Completions object instead of text"
    )
    add_model_option(parser)
    add_loading_options(parser)
    add_prompt_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate as ``args`` say; 0 once the answer is out."""
    body = request_body(args)
    with status("Starting"):
        from rorqual.cli.loading import open_session
        from rorqual.cli.view import printable

    with open_session(**loading_fields(args)) as session:
        if args.json:
            print(session.complete(body, int(time.time())))
            return 0
        reply = session.ask(body)
        shows_reasoning = sys.stderr.isatty()
        for delta in reply:
            if delta.reasoning and shows_reasoning:
                text = printable(delta.reasoning)
                print(f"\x1b[2m{text}\x1b[0m", end="", file=sys.stderr, flush=True)
            if delta.content:
                if shows_reasoning and reply.reasoning and reply.content == delta.content:
                    print(file=sys.stderr)
                text = printable(delta.content) if sys.stdout.isatty() else delta.content
                print(text, end="", flush=True)
        if reply.content:
            print()
        for call in reply.tool_calls:
            print(json.dumps(call.to_wire(), ensure_ascii=False))
        if reply.finish_reason == "length":
            full = reply.usage.get("total_tokens") == session.context_tokens
            where = f"the end of --context, {session.context_tokens}" if full else "max_tokens"
            print(f"rorqual: the answer was cut off at {where}", file=sys.stderr)
    return 0


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    """The Chat Completions body the options stand for, without ``model``.

    Raises:
        ConfigError: a file cannot be read, or there is no prompt.
    """
    from rorqual.protocol.modes import request_fields

    prompt = args.prompt
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise ConfigError("no prompt: give one as an argument or on standard input")
        prompt = read_text(Path("-")).strip()
    if not prompt:
        raise ConfigError("the prompt is empty")
    for path in reversed(args.doc or []):
        prompt = with_document(read_text(path), prompt)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    body: dict[str, Any] = {
        "messages": [*messages, {"role": "user", "content": prompt}],
        **wire_fields(args),
    }
    if args.tools is not None:
        body["tools"] = read_tools(args.tools)
    if args.mode is not None:
        body.update(request_fields(args.mode))
    return body
