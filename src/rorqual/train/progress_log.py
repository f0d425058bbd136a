"""What a training run shows and leaves behind: a live bar or plain lines, a CSV and a plot."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rorqual.train.conversation import TASKS

LOSS_COLUMNS = (
    "step",
    "tokens",
    "loss",
    *(f"loss_{task}" for task in TASKS),
    "mtp_loss",
    "indexer_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
    "padding",
    "stage",
    "wall_s",
)
EVAL_COLUMNS = ("step", "tokens", "wall_s", "slice", "answers", "exact", "token_accuracy")


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One line of ``loss.csv``; fields as in ``LOSS_COLUMNS``."""

    step: int
    tokens: int
    loss: float
    by_task: dict[str, float]
    mtp_loss: float
    indexer_loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    padding: float
    stage: int
    wall_s: float

    def cells(self) -> list[str]:
        """The CSV cells; empty where a task did not occur."""
        tasks = [f"{self.by_task[t]:.5f}" if t in self.by_task else "" for t in TASKS]
        return [
            str(self.step),
            str(self.tokens),
            f"{self.loss:.5f}",
            *tasks,
            f"{self.mtp_loss:.5f}",
            f"{self.indexer_loss:.5f}",
            f"{self.grad_norm:.4f}",
            f"{self.learning_rate:.3e}",
            f"{self.tokens_per_s:.0f}",
            f"{self.padding:.4f}",
            str(self.stage),
            f"{self.wall_s:.1f}",
        ]


class ProgressLog:
    """Shows progress and appends to ``loss.csv`` and ``eval.csv``. Use in ``with``.

    A terminal gets a live bar; anything else gets a plain line every ``line_every`` steps.
    """

    def __init__(self, run_dir: Path, *, line_every: int = 10, console: Console | None = None):
        self._run_dir = run_dir
        self._line_every = line_every
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._num_lines = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._bar.add_task("training", total=1.0, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, row: StepRow, progress: float) -> None:
        """Record one step."""
        self._append("loss.csv", LOSS_COLUMNS, [row.cells()])
        tasks = " ".join(f"{task} {loss:.3f}" for task, loss in row.by_task.items())
        text = (
            f"step {row.step} · {row.tokens / 1e6:.2f} M tokens · loss {row.loss:.3f} ({tasks}) "
            f"· {row.tokens_per_s:.0f} tok/s · stage {row.stage + 1}"
        )
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=progress, text=text)
        elif self._num_lines % self._line_every == 0:
            self.say(f"{100 * progress:5.1f}% {text} · lr {row.learning_rate:.2e}")
        self._num_lines += 1

    def evaluation(self, step: int, tokens: int, wall_s: float, rows: list[EvalRow]) -> None:
        """Record a held-out evaluation."""
        self._append(
            "eval.csv",
            EVAL_COLUMNS,
            [
                [
                    step,
                    tokens,
                    f"{wall_s:.1f}",
                    r.slice,
                    r.num_answers,
                    f"{r.exact:.4f}",
                    f"{r.token_accuracy:.4f}",
                ]
                for r in rows
            ],
        )
        shown = "  ".join(f"{r.slice} {100 * r.exact:.1f}%" for r in rows)
        self.say(f"held-out at step {step}: {shown}")

    def say(self, text: str) -> None:
        """Print one line above the bar, or as it is."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _append(self, name: str, header: tuple[str, ...], rows: list[list[Any]]) -> None:
        path = self._run_dir / name
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(header)
            writer.writerows(rows)


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """Teacher-forced accuracy on one slice of the held-out set."""

    slice: str
    num_answers: int
    exact: float
    """Share of answers whose every token is the model's first choice."""
    token_accuracy: float


def drop_rows_after(run_dir: Path, step: int) -> None:
    """Forget CSV rows written after ``step``: a resumed run writes them again."""
    for name in ("loss.csv", "eval.csv"):
        path = run_dir / name
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            kept = [row for row in rows if int(row[0]) <= step]
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *kept])


def plot(run_dir: Path) -> Path | None:
    """Draw ``plot.png`` from the CSVs; None where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    losses = _read(run_dir / "loss.csv")
    evals = _read(run_dir / "eval.csv")
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True)
    for task in TASKS:
        points = [
            (int(r["tokens"]) / 1e6, float(r[f"loss_{task}"])) for r in losses if r[f"loss_{task}"]
        ]
        if points:
            top.plot(*zip(*points, strict=True), label=task, linewidth=0.8)
    top.set_yscale("log")
    top.set_ylabel("loss, nats per generated token")
    if losses:
        top.legend()
    for name in dict.fromkeys(r["slice"] for r in evals):
        points = [
            (int(r["tokens"]) / 1e6, 100 * float(r["exact"])) for r in evals if r["slice"] == name
        ]
        bottom.plot(*zip(*points, strict=True), label=name, marker=".")
    bottom.set_ylabel("held-out answers, all tokens right, %")
    bottom.set_xlabel("million tokens")
    if evals:
        bottom.legend(fontsize="small")
    figure.tight_layout()
    path = run_dir / "plot.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
