"""``rorqual inspect``: what a model is and costs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rorqual.cli.models import DEFAULT_MODEL, available_models, resolve_model
from rorqual.cli.progress import status

if TYPE_CHECKING:  # imported where needed, so that the command line starts quickly
    from rich.console import RenderableType
    from rich.table import Table

    from rorqual.model.inspect import DtypeTotal, Inspection, LayerRun


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a model's size, layers and cost",
        description="Show parameters, stored bytes, layer schedule and cache bytes per token of a "
        "checkpoint (checking that its files are whole), a config.json, or a preset such as "
        "v4-flash, v4-pro or tiny.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="checkpoint directory, config.json, built-in model or preset (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if the model is whole."""
    with status("Reading"):
        from dataclasses import asdict

        from rorqual.model.inspect import inspect_model

        # A built-in checkpoint says more than the preset of the same name.
        is_built_in = args.model in available_models()
        inspection = inspect_model(resolve_model(args.model) if is_built_in else args.model)
    if args.json:
        print(json.dumps(asdict(inspection), default=str))
        return 0
    from rich.console import Console

    Console().print(render(inspection))
    return 0


def render(inspection: Inspection) -> RenderableType:
    """The report as a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config, cost, files = inspection.config, inspection.cost, inspection.files
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("parameters", f"{_count(cost.total_parameters)} total, without MTP")
    facts.add_row("", f"{_count(cost.active_parameters)} active per token")
    where = "official layout, computed" if files is None else f"{files.layout} layout"
    size = f"{_size(inspection.num_bytes)} in {inspection.num_tensors:,} tensors"
    facts.add_row("weights", f"{size} ({where})")
    if files is not None:
        facts.add_row("", f"{files.num_files} safetensors file{'s' * (files.num_files != 1)}")
    experts = f"{config.n_routed_experts} routed + {config.n_shared_experts} shared"
    facts.add_row("experts", f"{experts}, {config.num_experts_per_tok} routed per token")
    facts.add_row("width", f"{config.hidden_size} x {config.hc_mult} streams")
    heads = f"{config.num_attention_heads} heads x {config.head_dim}"
    facts.add_row("attention", f"{heads}, window {config.sliding_window}")
    facts.add_row("context", f"{config.max_position_embeddings:,} tokens, as the network is built")
    facts.add_row("numerics", config.numerics)
    cache = cost.cache
    entries = f"{cache.entry_bytes} B per entry, {cache.index_key_bytes} B per index key"
    facts.add_row("cache", f"{cache.per_token:,.2f} B per token ({entries})")
    fixed = cache.window_bytes + cache.tail_bytes
    facts.add_row("", f"{_size(fixed)} fixed per sequence")
    full = cache.total(config.max_position_embeddings)
    facts.add_row("", f"{_size(full)} for one full context")
    return Group(
        Text(inspection.name, style="bold"),
        facts,
        _schedule_table(inspection.schedule),
        _dtype_table(inspection.dtypes),
    )


def _schedule_table(schedule: tuple[LayerRun, ...]) -> Table:
    from rich.table import Table

    table = Table("layers", "attention", "routing", title="layer schedule", title_justify="left")
    for run in schedule:
        layers = f"{run.first}" if run.first == run.last else f"{run.first}-{run.last}"
        attention = " and ".join(run.attention) + (" alternating" * (len(run.attention) > 1))
        table.add_row(layers, attention + " (MTP)" * run.is_mtp, run.routing)
    return table


def _dtype_table(dtypes: tuple[DtypeTotal, ...]) -> Table:
    from rich.table import Table

    table = Table("dtype", "tensors", "bytes", title="storage", title_justify="left")
    for total in dtypes:
        table.add_row(total.dtype, f"{total.num_tensors:,}", _size(total.num_bytes))
    return table


def _count(value: int) -> str:
    """12,345,678,901 -> '12.35 B'."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return str(value)


def _size(value: float) -> str:
    """Bytes in decimal units, as file sizes are usually given."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.0f} B"
