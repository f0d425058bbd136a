"""``rorqual serve``: a model behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rorqual.cli.keys import add_key_file_option, key_file
from rorqual.cli.options import (
    add_loading_options,
    add_model_argument,
    loading_fields,
    positive_int,
)
from rorqual.cli.progress import status
from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.server.access_log import AccessLog
    from rorqual.server.keys import KeyRing


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve Chat Completions, Messages and Responses for any OpenAI or Anthropic "
        "client. Prints the URL and a curl command to try. Listens on this machine only, to "
        "everybody on it; with --host on other addresses, to holders of a key of 'rorqual keys'.",
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
    _add_door_options(parser)
    parser.set_defaults(run=run)


def _add_door_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may use it, and how much")
    group.add_argument(
        "--require-key",
        action="store_true",
        help="ask for an API key on this machine too; other addresses always do",
    )
    add_key_file_option(parser)
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web page origin that may call from a browser; repeatable (default: none)",
    )
    group.add_argument(
        "--max-requests",
        type=positive_int,
        default=2048,
        metavar="N",
        help="requests under way at a time before new ones get status 503 (default: %(default)s)",
    )
    group.add_argument(
        "--max-body-mib",
        type=positive_int,
        default=16,
        metavar="MIB",
        help="largest request body (default: %(default)s)",
    )
    group = parser.add_argument_group("operation")
    group.add_argument(
        "--access-log",
        default="-",
        metavar="FILE",
        help="one JSON line per request; - is stderr, 'off' none (default: %(default)s)",
    )
    group.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="keep given answers here, so that conversations may go on after a restart "
        "(default: in memory)",
    )
    group.add_argument(
        "--drain",
        type=positive_int,
        default=30,
        metavar="SECONDS",
        help="time running answers get to finish after SIGTERM or Ctrl-C; a second one cuts it "
        "short (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; 0 after an orderly shutdown."""
    with status("Starting"):
        from rorqual.cli.loading import open_session
        from rorqual.engine.scheduler import SchedulerLimits
        from rorqual.server.history import History
        from rorqual.server.run import serve

    limits = SchedulerLimits(max_running=args.max_batch, max_step_tokens=args.step_tokens)
    with ExitStack() as resources:
        keys = _keys(args, resources)  # first: a refusal must not wait for the model to load
        access_log = _access_log(args.access_log, resources)
        session = resources.enter_context(
            open_session(
                **loading_fields(args),
                name=args.name,
                limits=limits,
                max_waiting=args.max_waiting,
            )
        )
        print(f"{session.card.name} runs on {session.device}", file=sys.stderr)
        serve(
            session.engine,
            session.tokenizer,
            session.card,
            host=args.host,
            port=args.port,
            keys=keys,
            history=resources.enter_context(History(args.history)),
            access_log=access_log,
            cors_origins=args.cors_origin,
            max_requests=args.max_requests,
            max_body_bytes=args.max_body_mib * 2**20,
            drain_s=args.drain,
            end_running=lambda: session.engine.close(drain=False),
            announce=lambda text: print(text, flush=True),
        )
    print("stopped", file=sys.stderr)
    return 0


def _keys(args: argparse.Namespace, resources: ExitStack) -> KeyRing | None:
    """The keys to ask for; None on this machine, unless wanted."""
    from rorqual.server.keys import KeyRing, KeyStore
    from rorqual.server.run import check_exposure, is_loopback

    if is_loopback(args.host) and not args.require_key:
        return None
    keys = KeyRing(resources.enter_context(KeyStore(key_file(args))))
    check_exposure(args.host, keys)
    return keys


def _access_log(file: str, resources: ExitStack) -> AccessLog | None:
    from rorqual.server.access_log import AccessLog

    if file == "off":
        return None
    target: BinaryIO = sys.stderr.buffer
    if file != "-":
        try:
            target = resources.enter_context(Path(file).open("ab"))  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"--access-log {file}: {error.strerror}") from None
    return AccessLog(target)
