"""``rorqual serve``: a model behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

import argparse
import sys

from rorqual.cli.options import (
    add_loading_options,
    add_model_argument,
    loading_fields,
    positive_int,
)
from rorqual.cli.progress import status


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve Chat Completions for any OpenAI client. Prints the URL and a curl "
        "command to try. There is no authentication: it listens on this machine only, unless "
        "--host says otherwise.",
    )
    add_model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        default=8,
        metavar="N",
        help="requests generated at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-waiting",
        type=positive_int,
        default=256,
        metavar="N",
        help="requests queued before new ones get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--step-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="tokens per model step: larger reads prompts faster, smaller lets running answers "
        "wait less (default: %(default)s)",
    )
    add_loading_options(parser)
    parser.add_argument(
        "--name", help="model name clients use (default: its card.json, else the directory's name)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; 0 after an orderly shutdown."""
    with status("Starting"):
        from rorqual.cli.loading import open_session
        from rorqual.engine.scheduler import SchedulerLimits
        from rorqual.server.run import serve

    limits = SchedulerLimits(max_running=args.max_batch, max_step_tokens=args.step_tokens)
    with open_session(
        **loading_fields(args),
        name=args.name,
        limits=limits,
        max_waiting=args.max_waiting,
    ) as session:

        def announce(text: str) -> None:
            print(text, flush=True)

        print(f"{session.card.name} runs on {session.device}", file=sys.stderr)
        serve(
            session.engine,
            session.tokenizer,
            session.card,
            host=args.host,
            port=args.port,
            announce=announce,
        )
    print("stopped", file=sys.stderr)
    return 0
