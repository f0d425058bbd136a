"""``rorqual keys``: API keys of a server, made, listed and revoked, also while it runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.options import MODES, positive_int

if TYPE_CHECKING:
    from rorqual.server.keys import ApiKey

_UNITS_S = {"m": 60, "h": 3600, "d": 86_400}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="API keys of 'rorqual serve'. A running server follows within a second.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", help="what logs call it")
    create.add_argument(
        "--models", type=_names, metavar="A,B", help="models it may use (default: all)"
    )
    create.add_argument(
        "--modes",
        type=_modes,
        metavar="A,B",
        help=f"reasoning modes it may use, of {', '.join(MODES)} (default: all)",
    )
    create.add_argument(
        "--requests-per-minute", type=positive_int, metavar="N", help="(default: no limit)"
    )
    create.add_argument(
        "--tokens-per-minute",
        type=positive_int,
        metavar="N",
        help="of prompts and answers together (default: no limit)",
    )
    create.add_argument(
        "--concurrent", type=positive_int, metavar="N", help="requests at a time (default: any)"
    )
    create.add_argument(
        "--expires", type=_duration_s, metavar="TIME", help="such as 90m, 12h or 30d from now"
    )
    create.set_defaults(run=_create)

    show = actions.add_parser("list", help="show all keys; their secrets are not kept")
    show.set_defaults(run=_list)

    revoke = actions.add_parser("revoke", help="end a key")
    revoke.add_argument("key", metavar="NAME", help="its name or id")
    revoke.set_defaults(run=_revoke)

    for action in (create, show, revoke):
        add_key_file_option(action)


def add_key_file_option(parser: argparse.ArgumentParser) -> None:
    """``--key-file``, the same for the server and its keys."""
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="where API keys are kept (default: rorqual/keys.sqlite3 in $XDG_DATA_HOME or "
        "~/.local/share)",
    )


def key_file(args: argparse.Namespace) -> Path:
    """The file that ``--key-file`` or the environment names."""
    if args.key_file is not None:
        return Path(args.key_file)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "rorqual" / "keys.sqlite3"


def _create(args: argparse.Namespace) -> int:
    from rorqual.server.keys import KeyStore, Permissions

    permissions = Permissions(
        models=args.models,
        modes=args.modes,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        max_concurrent=args.concurrent,
        expires_at=None if args.expires is None else time.time() + args.expires,
    )
    with KeyStore(key_file(args)) as store:
        key, text = store.create(args.name, permissions)
    print(text)  # alone on stdout, so that a script can take it
    print(f"key {key.name!r} ({key.id}); it is not shown again", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from rorqual.server.keys import KeyStore

    with KeyStore(key_file(args)) as store:
        keys = store.list()
    table = Table("id", "name", "state", "created", "expires", "may use", "limits", box=None)
    for row in _rows(keys, time.time()):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    return 0


def _rows(keys: Sequence[ApiKey], now: float) -> list[tuple[str, ...]]:
    return [
        (
            key.id,
            key.name,
            key.state(now),
            _date(key.created_at),
            _date(key.permissions.expires_at),
            _allowed(key),
            _limits(key),
        )
        for key in keys
    ]


def _allowed(key: ApiKey) -> str:
    kinds = [kind for kind in (key.permissions.models, key.permissions.modes) if kind is not None]
    return "; ".join(", ".join(sorted(kind)) for kind in kinds) or "everything"


def _limits(key: ApiKey) -> str:
    may, limits = key.permissions, []
    if may.requests_per_minute is not None:
        limits.append(f"{may.requests_per_minute}/min")
    if may.tokens_per_minute is not None:
        limits.append(f"{may.tokens_per_minute} tokens/min")
    if may.max_concurrent is not None:
        limits.append(f"{may.max_concurrent} at a time")
    return ", ".join(limits) or "none"


def _date(unix_s: float | None) -> str:
    if unix_s is None:
        return "never"
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _revoke(args: argparse.Namespace) -> int:
    from rorqual.server.keys import KeyStore

    with KeyStore(key_file(args)) as store:
        key = store.revoke(args.key)
    print(f"revoked key {key.name!r} ({key.id})", file=sys.stderr)
    return 0


def _names(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas")
    return names


def _modes(text: str) -> frozenset[str]:
    names = _names(text)
    if unknown := names - set(MODES):
        raise argparse.ArgumentTypeError(
            f"unknown mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}"
        )
    return names


def _duration_s(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d{0,6})([mhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 12h or 30d, got {text!r}")
    return int(match[1]) * _UNITS_S[match[2]]
