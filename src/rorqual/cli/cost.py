"""``rorqual cost``: operations, cache and weight bytes per token of models at any context."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.options import positive_int
from rorqual.errors import ConfigError

if TYPE_CHECKING:  # imported where needed, so that the command line starts quickly
    from rich.console import RenderableType
    from rich.table import Table

    from rorqual.model.economics import Economics, Point

_DEFAULT_MODELS = ("v3.2", "v4-pro", "v4-flash")
_DEFAULT_CONTEXTS = (4_000, 16_000, 64_000, 128_000, 256_000, 512_000, 1_000_000)
_UNITS = {"k": 10**3, "m": 10**6}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "cost",
        help="show what a token costs at any context",
        description="Show operations, cache bytes and weight bytes per token by formula, beside "
        "DeepSeek-V3.2. Percentages are of the first model named.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="CONFIG",
        help="v3.2, a preset such as v4-flash, a config.json or a checkpoint directory "
        f"(default: {' '.join(_DEFAULT_MODELS)})",
    )
    parser.add_argument(
        "--context",
        type=context_lengths,
        default=list(_DEFAULT_CONTEXTS),
        metavar="N,...",
        help="tokens of context, such as 4k,128k,1M; k is 1,000 (default: 4k to 1M)",
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=64,
        metavar="N",
        help="sequences decoded together, for weight bytes (default: %(default)s)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the curves to FILE (.png, .svg or .pdf)"
    )
    # Whatever is wrong here was typed: it exits like any other wrong usage.
    parser.set_defaults(run=run, usage_error=parser.error)


def context_lengths(text: str) -> list[int]:
    """argparse type: comma-separated token counts, each with an optional k or M; sorted, unique."""
    lengths = set()
    for item in text.split(","):
        digits = item.strip().lower()
        unit = _UNITS.get(digits[-1:], 1)
        digits = digits if unit == 1 else digits[:-1]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 15 and int(digits)):
            raise argparse.ArgumentTypeError(
                f"{item!r} is not a number of tokens >= 1, such as 32768, 128k or 1M"
            )
        lengths.add(int(digits) * unit)
    return sorted(lengths)


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the files asked for; 0 if all were written."""
    from rich.console import Console

    from rorqual.model.economics import economics, point

    usage_error: Callable[[str], None] = args.usage_error
    try:
        models = [economics(name) for name in dict.fromkeys(args.models or _DEFAULT_MODELS)]
        points = [[point(model, context) for model in models] for context in args.context]
        if args.csv is not None:
            write_csv(args.csv, models, points, args.batch)
        if args.plot is not None:
            from rorqual.cli.cost_plot import plot

            plot(args.plot, points)
    except ConfigError as error:
        usage_error(str(error))
    console = Console()
    for table in tables(models, points, args.batch):
        console.print(table)
    return 0


def tables(
    models: Sequence[Economics], points: Sequence[Sequence[Point]], batch: int
) -> list[RenderableType]:
    """The report: three curves over the context, the accounting, the weights.

    points: one row per context, one point per model in the order of ``models``.
    """
    return [
        _curve("decode, G operations per token", points, lambda p: p.decode.cost / 1e9),
        _curve(
            "prefill, G operations per token (mean of a prompt)",
            points,
            lambda p: p.prefill.cost / 1e9,
        ),
        _curve("cache of one sequence, MB", points, lambda p: p.cache_bytes / 1e6),
        _accounting(points[-1]),
        _weights(models, batch),
    ]


def _table(title: str, first: str, names: Sequence[str], caption: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _curve(title: str, points: Sequence[Sequence[Point]], value: Callable[[Point], float]) -> Table:
    table = _table(title, "context", [point.name for point in points[0]])
    for row in points:
        values = [value(point) for point in row]
        cells = [f"{_figure(v)} ({v / values[0]:6.1%})" for v in values[1:]]
        table.add_row(f"{row[0].context:,}", _figure(values[0]), *cells)
    return table


def _figure(value: float) -> str:
    """At least four significant digits, never an exponent: 12,305 or 31.05 or 0.01712."""
    decimals = 3 if value == 0 else max(0, 3 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def _accounting(row: Sequence[Point]) -> Table:
    """Decode at one context, part by part, with what each precision counts."""
    from rorqual.model.flops import COST, part_names

    weights = ", ".join(f"{name} {weight:g}" for name, weight in COST.items())
    table = _table(
        f"decode at {row[0].context:,} tokens, G operations x weight = cost",
        "part",
        [point.name for point in row],
        f"Operations are counted in units of one FP8 operation: {weights}.",
    )
    by_name = [{part.name: part for part in point.decode.parts} for point in row]
    for name in part_names(point.decode for point in row):
        cells = []
        for parts in by_name:
            part = parts.get(name)
            if part is None:
                cells.append("-")
            else:
                weight = COST[part.precision]
                cells.append(
                    f"{_figure(part.flops / 1e9)} x {weight:g} = {_figure(part.cost / 1e9)}"
                )
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("all, cost", *(_figure(point.decode.cost / 1e9) for point in row))
    table.add_row("all, operations", *(_figure(point.decode.flops / 1e9) for point in row))
    return table


def _weights(models: Sequence[Economics], batch: int) -> Table:
    table = _table("weights and cache, per token", "", [model.name for model in models])
    for size in sorted({1, batch}):
        cells = [f"{_figure(model.weights.per_token(size) / 1e6)} MB" for model in models]
        table.add_row(f"weights read, batch {size}", *cells)
    table.add_row("cache growth", *(f"{model.cache.per_token:,.2f} B" for model in models))
    table.add_row("cache entry", *(f"{model.cache.entry_bytes} B" for model in models))
    table.add_row("index key", *(f"{model.cache.index_key_bytes} B" for model in models))
    table.add_section()
    fixed = [(model.cache.window_bytes, model.cache.tail_bytes) for model in models]
    table.add_row("window, per sequence", *(f"{_figure(window / 1e6)} MB" for window, _ in fixed))
    table.add_row("unfinished groups", *(f"{_figure(tail / 1e6)} MB" for _, tail in fixed))
    return table


def write_csv(
    path: Path, models: Sequence[Economics], points: Sequence[Sequence[Point]], batch: int
) -> None:
    """One row per model and context; costs are FP8-equivalent operations.

    Raises:
        ConfigError: the file cannot be written.
    """
    from rorqual.model.flops import part_names

    names = part_names(point.decode for row in points for point in row)
    head = ["model", "context_tokens", "decode_operations", "decode_cost", "prefill_operations"]
    head += ["prefill_cost", "cache_bytes", "cache_bytes_per_token", "weight_bytes_batch_1"]
    head += [f"weight_bytes_batch_{batch}"] * (batch != 1)
    head += [f"decode_cost_{name.replace(' ', '_')}" for name in names]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for row in points:
                for model, point in zip(models, row, strict=True):
                    parts = {part.name: part.cost for part in point.decode.parts}
                    writer.writerow(
                        [point.name, point.context, point.decode.flops, point.decode.cost]
                        + [point.prefill.flops, point.prefill.cost]
                        + [point.cache_bytes, model.cache.per_token]
                        + [model.weights.per_token(size) for size in sorted({1, batch})]
                        + [parts.get(name, 0.0) for name in names]
                    )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
