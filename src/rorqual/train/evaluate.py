"""Final evaluation by generation: held-out questions asked as a client would, answers graded.

Greedy decoding of rendered chat requests, parsed as the server parses them; see ``exam`` for what
is asked and ``grading`` for what counts. Shares come with 95 % Wilson intervals. ``held_out`` is
the cheap teacher-forced check during training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rorqual.errors import CheckpointError, ConfigError, RorqualError
from rorqual.model.checkpoint import load_model
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.allocator import keep_memory
from rorqual.train.conversation import Dialogue
from rorqual.train.exam import (
    LENGTH_BUCKETS,
    DocumentExam,
    draw_documents,
    draw_tool_dialogues,
)
from rorqual.train.examiner import Examiner, merged, num_answers
from rorqual.train.grading import Share
from rorqual.train.machine import describe_machine, usable_cores
from rorqual.train.run_state import latest_run_state, load_run_state
from rorqual.train.served import ChatModel

DEFAULT_SAMPLES = 150
FOLLOW_UP_SHARE = 3
"""One tool conversation in so many goes on to a second request."""
_DOCUMENTS_TOGETHER = 6
_DIALOGUES_TOGETHER = 16

_T = TypeVar("_T")


class Candidate(NamedTuple):
    """A model to be evaluated and where it came from."""

    model: Transformer
    source: dict[str, Any]


def load_candidate(path: Path) -> Candidate:
    """A model folder, a training checkpoint (``.pt``), or a run directory's newest checkpoint.

    Raises:
        CheckpointError: nothing there can be read as one of them.
        ConfigError: a config is wrong.
    """
    if (path / "config.json").is_file():
        return Candidate(load_model(path), {"model": str(path)})
    file = path if path.is_file() else latest_run_state(path)
    if file is None:
        raise CheckpointError(f"{path}: neither a model folder nor a run with checkpoints")
    state = load_run_state(file)
    try:
        model = Transformer(ModelConfig.from_dict(state["settings"]["model"]))
        model.load_state_dict(state["trainer"]["model"])
        source = {
            "checkpoint": str(file),
            "step": state["trainer"]["num_steps"],
            "tokens": state["trainer"]["num_tokens"],
        }
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of a training run: {error}") from None
    return Candidate(model, source)


def evaluate(
    candidate: Candidate,
    tokenizer: Tokenizer,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    buckets: Sequence[tuple[int, int]] = LENGTH_BUCKETS,
    workers: int = 1,
    device: str = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask everything and return the report as plain data.

    ``samples``: stated questions per document length and mode, and tool conversations per mode.
    ``workers``: threads that ask at the same time. Shows a progress bar on ``console``.

    Raises ConfigError unless ``samples`` is positive and there are ``buckets``.
    """
    if samples < 1 or not buckets:
        raise ConfigError(f"samples must be >= 1, got {samples}, over >= 1 length, got {buckets}")
    started = time.monotonic()
    model = candidate.model.to(device)
    card = ModelCard(
        name="evaluated",
        generation="preview",
        context_length=model.config.max_position_embeddings,
        default_mode="non-think",
    )
    exams = {
        bucket: draw_documents(tokenizer, seed=seed, bucket=bucket, num_questions=samples)
        for bucket in buckets
    }
    num_longer = -(-samples // FOLLOW_UP_SHARE)
    num_shorter = samples - num_longer
    dialogues = [
        *draw_tool_dialogues(seed=seed, first=0, count=num_longer, num_requests=2),
        *draw_tool_dialogues(seed=seed, first=num_longer, count=num_shorter, num_requests=1),
    ]
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
    ) as bar:
        task = bar.add_task("answers", total=num_answers(exams.values(), dialogues))

        def examiner() -> Examiner:
            chat = ChatModel(model, tokenizer, card)
            return Examiner(chat, on_done=lambda: bar.advance(task))

        def ask_documents(group: Sequence[DocumentExam], bucket: tuple[int, int]) -> Examiner:
            asking = examiner()
            asking.ask_documents(group, bucket[1])
            return asking

        def ask_tools(group: Sequence[Dialogue]) -> Examiner:
            asking = examiner()
            asking.ask_tools(group)
            return asking

        # Threads suffice: the tensor operations, most of the time, run outside the interpreter's
        # lock. The longest jobs start first.
        with ThreadPoolExecutor(workers, thread_name_prefix="evaluate") as pool:
            jobs = [
                pool.submit(ask_documents, group, bucket)
                for bucket in sorted(exams, reverse=True)
                for group in _groups(exams[bucket], _DOCUMENTS_TOGETHER)
            ]
            jobs += [pool.submit(ask_tools, g) for g in _groups(dialogues, _DIALOGUES_TOGETHER)]
            try:
                rows = merged([job.result() for job in jobs])
            finally:
                pool.shutdown(cancel_futures=True)
    return {
        **candidate.source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": samples,
        "seed": seed,
        "decoding": "greedy",
        "seconds": round(time.monotonic() - started, 1),
        "machine": describe_machine(device),
        "overall": _overall(rows),
        "slices": rows,
    }


def _groups(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def _overall(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Every measure of first turns over all document lengths and modes."""
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        if row["turn"] == "first":
            for measure, share in row["measures"].items():
                name = f"{row['task']} {measure}"
                right, total = counts.get(name, (0, 0))
                counts[name] = (right + share["right"], total + share["total"])
    return {
        name: Share(right=right, total=total).to_dict() for name, (right, total) in counts.items()
    }


def share_text(share: dict[str, float]) -> str:
    """``93.3 (88.2-96.3)``, in percent."""
    return f"{100 * share['rate']:.1f} ({100 * share['low']:.1f}-{100 * share['high']:.1f})"


def table_rows(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of ``task``'s table: one line per slice, one column per measure."""
    rows = [row for row in report["slices"] if row["task"] == task]
    measures = list(rows[0]["measures"]) if rows else []
    has_length = any(row["tokens"] for row in rows)
    header = ["mode", "turn", *(["tokens"] if has_length else []), "answers", *measures]
    lines = []
    for row in rows:
        shares = [row["measures"][measure] for measure in measures]
        length = [f"<= {row['tokens']}"] if has_length else []
        counts = [str(shares[0]["total"]), *map(share_text, shares)]
        lines.append([row["mode"], row["turn"], *length, *counts])
    overall = [report["overall"][f"{task} {measure}"] for measure in measures]
    length = ["all"] if has_length else []
    if overall:
        counts = [str(overall[0]["total"]), *map(share_text, overall)]
        lines.append(["both", "first", *length, *counts])
    return header, lines


def print_tables(report: dict[str, Any], console: Console) -> None:
    """The report for a terminal, one table per task."""
    for task in dict.fromkeys(row["task"] for row in report["slices"]):
        header, lines = table_rows(report, task)
        table = Table(title=f"{task}, held-out: % of answers (95 % Wilson interval)")
        for name in header:
            table.add_column(name)
        for line in lines[:-1]:
            table.add_row(*line)
        table.add_section()
        table.add_row(*lines[-1])
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rorqual.train.evaluate",
        description="Evaluate a model on held-out questions by generation.",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="MODEL",
        help="model folder, training checkpoint (.pt), or run directory (its newest checkpoint)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--samples",
        type=int,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="questions per document length and mode (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=LENGTH_BUCKETS[-1][1],
        help="leave out longer documents (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=None,
        metavar="DIR",
        help="directory with tokenizer.json (default: MODEL; models/nano-flash for a checkpoint)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="threads that ask at the same time, one core each (default: %(default)s, all cores)",
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    keep_memory()
    if args.workers > 1:
        torch.set_num_threads(1)
    try:
        candidate = load_candidate(args.path)
        has_own = (args.path / "tokenizer.json").is_file()
        folder = args.tokenizer or (args.path if has_own else Path("models/nano-flash"))
        report = evaluate(
            candidate,
            Tokenizer.from_dir(folder),
            samples=args.samples,
            seed=args.seed,
            buckets=[b for b in LENGTH_BUCKETS if b[1] <= args.max_tokens],
            workers=max(1, args.workers),
            device=args.device,
        )
    except RorqualError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print_tables(report, Console(width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
