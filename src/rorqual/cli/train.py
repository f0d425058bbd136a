"""``rorqual train``: pre-train a small model on generated tasks, from nothing or from a pause."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rorqual.cli.options import positive_int
from rorqual.cli.progress import status


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="pre-train a small model on generated tasks",
        description="Train a model from scratch. Data is generated from the seed; nothing is "
        "downloaded. RUN receives checkpoints, loss.csv, eval.csv, a plot and at the end model/. "
        "Run the same command again to resume; Ctrl-C saves first.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument(
        "--config",
        default="nano-flash",
        metavar="NAME|FILE",
        help="preset or config.json of the network (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="directory with tokenizer.json (default: that of the built-in nano-flash)",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="MODEL",
        help="continue from the weights of this model folder, on longer documents from the outset; "
        "take a new --seed, or it sees its old samples again",
    )
    parser.add_argument("--minutes", type=float, help="time budget (default: 100)")
    parser.add_argument("--steps", type=positive_int, help="stop after this many updates")
    parser.add_argument("--seed", type=int, help="of data and weights (default: 0)")
    parser.add_argument(
        "--tokens-per-step", type=positive_int, metavar="N", help="padding included"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in the forward pass")
    parser.add_argument("--device", help="torch device (default: cuda if present, else cpu)")
    parser.add_argument(
        "--processes",
        type=positive_int,
        metavar="N",
        help="CPU processes that share each batch (default: one per core; 1 on a GPU)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train to the end of the budget; 0 once the model is written."""
    with status("Starting"):
        from rorqual.model.checkpoint import read_config
        from rorqual.model.config import PRESETS
        from rorqual.train import pretrain
        from rorqual.train.schedule import TrainConfig
    fields = {"num_processes": _default_processes(args.device), **train_fields(args)}
    config = PRESETS.get(args.config) or read_config(Path(args.config))
    path = pretrain.run(
        config,
        TrainConfig.continued(**fields) if args.start else TrainConfig(**fields),
        args.tokenizer or _built_in_tokenizer(),
        args.run_dir,
        start=args.start,
        device=args.device,
    )
    print(f"wrote {path}")
    return 0


def train_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The training settings the options set; the others keep their defaults."""
    given = {
        "minutes": args.minutes,
        "max_steps": args.steps,
        "seed": args.seed,
        "tokens_per_step": args.tokens_per_step,
        "lr_peak": args.lr,
        "bf16": False if args.fp32 else None,
        "num_processes": args.processes,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    if args.steps is not None and args.minutes is None:
        fields["minutes"] = None
    return fields


def _default_processes(device: str | None) -> int:
    """One per core this process may use, where it will train on the CPU."""
    import torch

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return len(os.sched_getaffinity(0)) if on_cpu and hasattr(os, "sched_getaffinity") else 1


def _built_in_tokenizer() -> Path:
    """The folder of nano-flash, which has a tokenizer even before it has weights."""
    from rorqual.cli.models import model_folders
    from rorqual.errors import ConfigError

    for folder in model_folders():
        if (folder / "nano-flash" / "tokenizer.json").is_file():
            return folder / "nano-flash"
    raise ConfigError("no built-in tokenizer found; name one with --tokenizer")
