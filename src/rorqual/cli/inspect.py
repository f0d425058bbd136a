"""``rorqual inspect``: what a model is and costs."""

from __future__ import annotations

import argparse
import json

from rorqual.cli.models import DEFAULT_MODEL, available_models, resolve_model
from rorqual.cli.progress import status


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

        from rorqual.model.inspect import inspect_model, render

        # A built-in checkpoint says more than the preset of the same name.
        is_built_in = args.model in available_models()
        inspection = inspect_model(resolve_model(args.model) if is_built_in else args.model)
    if args.json:
        print(json.dumps(asdict(inspection), default=str))
        return 0
    from rich.console import Console

    Console().print(render(inspection))
    return 0
