"""``rorqual bench``: the engine and the sandboxes, measured here and now."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rorqual.bench.options import add_engine_options, add_kernel_options, add_long_options
from rorqual.cli.models import DEFAULT_MODEL, available_models, resolve_model
from rorqual.errors import ConfigError

_TINY = "tiny"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand and its benchmarks."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the engine and the sandboxes, beside others",
        description="Measure the engine or sandboxes. Numbers of one run are comparable, others "
        "hardly.",
    )
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add(kinds, "engine", "the targets, beside other engines", _engine, add_engine_options)
    _add(kinds, "kernels", "each kernel beside its bound", _kernels, add_kernel_options)
    long = _add(kinds, "long", "one long context, and a restart", _long, add_long_options)
    long.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"checkpoint directory, built-in model name, or {_TINY}: random weights "
        "(default: %(default)s)",
    )
    _add(kinds, "sandbox", "sandboxes, beside the raw tools", _sandbox, _add_sandbox_options)


def _add_sandbox_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument(
        "--density",
        type=int,
        default=300,
        metavar="N",
        help="containers alive at once, 0 for none (default: 300)",
    )
    parser.add_argument(
        "--root", type=Path, help="where sandboxes are kept (default: the system's)"
    )
    parser.add_argument(
        "--vm-image",
        type=Path,
        metavar="DISK",
        help="measure the vm too, with this disk, whose guest starts the agent",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them there")


def _add(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    add_options: Callable[[argparse.ArgumentParser], None],
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=f"Measure {text}.")
    parser.set_defaults(run=run)
    add_options(parser)
    return parser


def _engine(args: argparse.Namespace) -> int:
    from rorqual.bench.engine import run

    model = resolve_model(DEFAULT_MODEL) if DEFAULT_MODEL in available_models() else None
    return run(args, _words("engine"), model)


def _kernels(args: argparse.Namespace) -> int:
    from rorqual.bench.kernels import run

    return run(args)


def _long(args: argparse.Namespace) -> int:
    from rorqual.bench.long import run

    model = None if args.model == _TINY else resolve_model(args.model)
    return run(args, _words("long"), model)


def _sandbox(args: argparse.Namespace) -> int:
    from rorqual.bench.sandbox import run

    if args.repetitions < 1 or args.density < 0:
        raise ConfigError("--repetitions is at least 1 and --density at least 0")
    return run(args, _words("sandbox"))


def _words(name: str) -> list[str]:
    """What the user wrote after the benchmark's name, to print beside the numbers."""
    words = sys.argv[1:]
    return words[words.index(name) + 1 :] if name in words else []
