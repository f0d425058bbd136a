"""The engine's targets, measured in one run beside the peers that are installed.

    python -m rorqual.bench.engine [--parts speed,reuse] [--lengths 1024,4096] [--csv FOLDER]

Parts: ``speed`` (one thread, tokens per CPU-second, beside the peers), ``reuse`` (tokens of prompts
seen before that need no computation), ``disk`` (a prompt found there), ``streams`` and ``busy``
(wall clock on all cores: they want a quiet machine), ``isa``, ``weights`` and ``guesses``.
Predictions are printed before anything is measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rorqual.bench import speed, targets
from rorqual.bench.behaviour import (
    BehaviourRow,
    busy_rows,
    disk_rows,
    isa_rows,
    reuse_rows,
    stream_rows,
    weight_rows,
)
from rorqual.bench.options import PEERS, add_engine_options
from rorqual.bench.predict import (
    PREDICTED,
    all_weight_bytes,
    engine_predictions,
    prediction_line,
)
from rorqual.bench.report import conditions, print_conditions, table, version_of, write_csv
from rorqual.bench.roof import measure_roof
from rorqual.bench.setup import Setup
from rorqual.bench.speculation import speculation_rows
from rorqual.bench.speed import SpeedRow
from rorqual.errors import ConfigError

_SLOW_FROM = 32768
"""From this length on transformers and flyweight-llm are left out: minutes, and no target."""


def run(args: argparse.Namespace, argv: Sequence[str], model: Path | None) -> int:
    """Measure and print; 0 unless the cache misses its formula, which no busy machine excuses.

    model: the trained checkpoint that ``guesses`` asks; without one, that part is left out.

    Raises:
        ConfigError: an option is out of range.
    """
    if args.decode_tokens < 3 or args.context < 256:
        raise ConfigError("--decode-tokens must be >= 3 and --context >= 256")
    torch.set_num_threads(1)
    header = conditions(["rorqual", "bench", "engine"], argv)
    header |= {name: version_of(name) for name in PEERS}
    setup = Setup()
    roof = measure_roof(int(all_weight_bytes(setup)))
    header["roof"] = roof.words
    print_conditions(header)
    predictions = engine_predictions(
        setup,
        roof,
        lengths=args.lengths,
        context=args.context,
        threads=_threads(args),
        cores=len(os.sched_getaffinity(0)),
    )
    _print_table(PREDICTED, [prediction_line(p) for p in predictions], words_last=True)
    rows = _speed(args) if "speed" in args.parts else []
    behaviour = _behaviour(args, model)
    verdicts = targets.judge(rows, behaviour, predictions)
    if verdicts:
        _print_table(targets.HEAD, [targets.line(row) for row in verdicts], words_last=True)
    if args.csv is not None:
        args.csv.mkdir(parents=True, exist_ok=True)
        results: dict[str, Sequence[Any]] = {
            "predictions": predictions,
            "speed": rows,
            "behaviour": behaviour,
            "targets": verdicts,
        }
        for name, some in results.items():
            if some:
                write_csv(args.csv / f"engine_{name}.csv", header, some)
    return int(any(row.name.startswith("cache off") and not row.is_met for row in verdicts))


def _threads(args: argparse.Namespace) -> int:
    return int(args.threads or len(os.sched_getaffinity(0)))


def _speed(args: argparse.Namespace) -> list[SpeedRow]:
    wanted = [name for name in args.peers if name != "none"]
    rows: list[SpeedRow] = []
    with speed.workers(wanted, lambda note: print(f"# {note}")) as peers:
        for length in args.lengths:
            here = {
                name: peer
                for name, peer in peers.items()
                if length < _SLOW_FROM or name not in ("transformers", "flyweight-llm")
            }
            print(f"... {length} tokens", file=sys.stderr, flush=True)
            rows += speed.measure(
                here,
                length,
                decode_tokens=args.decode_tokens,
                repetitions=args.repetitions,
            )
    _print_table(speed.HEAD, [speed.line(row) for row in rows])
    return rows


def _behaviour(args: argparse.Namespace, model: Path | None) -> list[BehaviourRow]:
    threads = _threads(args)
    tokens = args.decode_tokens
    parts: dict[str, Callable[[], list[BehaviourRow]]] = {
        "reuse": lambda: reuse_rows(args.context),
        "disk": lambda: disk_rows(args.context),
        "streams": lambda: stream_rows(8, threads, min(args.context, 4096), 4 * tokens),
        "busy": lambda: busy_rows(threads, min(args.context, 4096), 4 * tokens),
        "isa": lambda: isa_rows(min(args.context, 4096), tokens),
        "weights": lambda: weight_rows(min(args.context, 1024), 4 * tokens),
    }
    if model is not None:
        parts["guesses"] = lambda: speculation_rows(model)
    rows: list[BehaviourRow] = []
    for name, measure in parts.items():
        if name in args.parts:
            print(f"... {name}", file=sys.stderr, flush=True)
            rows += measure()
    if rows:
        lines = [(row.name, f"{row.value:.1f}", row.unit, row.detail) for row in rows]
        _print_table(("", "", "unit", "of"), lines, words_last=True)
    return rows


def _print_table(
    head: Sequence[str], lines: Sequence[Sequence[str]], *, words_last: bool = False
) -> None:
    print(f"\n{table(head, lines, words_last=words_last)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, without ``guesses``, which needs a checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m rorqual.bench.engine", description=(__doc__ or "").partition("\n")[0]
    )
    add_engine_options(parser)
    try:
        return run(parser.parse_args(argv), argv, None)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
