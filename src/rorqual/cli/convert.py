"""``rorqual convert``: a checkpoint between the official and the transformers layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from rorqual.cli.models import resolve_model
from rorqual.cli.options import positive_int
from rorqual.cli.progress import byte_progress, status


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint's layout or number formats",
        description="Write a checkpoint in another layout, tensor by tensor: quantised values are "
        "copied bit for bit unless a number format is asked for, and the model is never whole in "
        "memory. A checkpoint already in DESTINATION is replaced, all or nothing.",
    )
    parser.add_argument("source", help="checkpoint directory or built-in model name")
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument(
        "--to", choices=("official", "transformers"), required=True, help="layout to write"
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp32"),
        default="keep",
        help="expand all weights to this format (default: keep)",
    )
    parser.add_argument(
        "--experts",
        choices=("keep", "fp8"),
        default="keep",
        help="fp8: rewrite FP4 experts as FP8 with the same values (default: keep)",
    )
    parser.add_argument(
        "--shard-mib",
        type=positive_int,
        metavar="MIB",
        help="largest file to write, in MiB (default: that of the checkpoint format)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; 0 once everything is on disk."""
    source = resolve_model(args.source)
    with status("Starting"):
        from rorqual.model.convert import convert_checkpoint
        from rorqual.model.shards import DEFAULT_MAX_SHARD_BYTES
    shard_bytes = args.shard_mib * 2**20 if args.shard_mib else DEFAULT_MAX_SHARD_BYTES
    with byte_progress(f"Converting {source.name}") as progress:
        num_bytes = convert_checkpoint(
            source,
            args.destination,
            to=args.to,
            dtype=args.dtype,
            experts=args.experts,
            max_shard_bytes=shard_bytes,
            progress=progress,
        )
    print(f"wrote {num_bytes / 2**20:.1f} MiB in the {args.to} layout to {args.destination}")
    return 0
