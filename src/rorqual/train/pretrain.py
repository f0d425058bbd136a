"""Pre-training of a small V4 model on generated tasks, from nothing or from a checkpoint.

``run`` trains, evaluates, checkpoints and resumes; ``Trainer.step`` is the loop's body. The run
directory holds ``run.json`` (settings and machine), ``checkpoints/``, ``loss.csv``, ``eval.csv``,
``plot.png`` and, at the end, ``model/`` in the official layout.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rorqual.errors import ConfigError, TrainingError
from rorqual.model.checkpoint import load_model, save_model
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.allocator import keep_memory
from rorqual.train.batches import BatchMaker, BatchState, Prefetcher
from rorqual.train.held_out import HeldOutSet
from rorqual.train.machine import describe_machine, why_not_compile
from rorqual.train.parallel import GradientWorkers
from rorqual.train.progress_log import ProgressLog, StepRow, drop_rows_after, plot
from rorqual.train.run_state import latest_run_state, load_run_state, save_run_state
from rorqual.train.schedule import TrainConfig, progress_at, stage_index
from rorqual.train.trainer import Trainer

RUN_FILE = "run.json"
_MODEL_FILES = ("tokenizer.json", "card.json")
"""Copied beside the trained weights from the tokenizer's folder, where it has them."""


def run(
    model_config: ModelConfig,
    config: TrainConfig,
    tokenizer_dir: Path,
    out_dir: Path,
    *,
    start: Path | None = None,
    device: str | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Path:
    """Train to the end of the schedule and write ``out_dir/model``; returns that path.

    A new run takes its weights from the model folder ``start``, else ``init_weights``.

    Continues from the newest checkpoint where ``out_dir`` has one; training settings may differ
    from those it was written with, which is said aloud, but the seed may not. ``device`` None
    takes CUDA when present, else the CPU. Interrupting (Ctrl-C) writes a checkpoint first.

    Raises:
        ConfigError: the vocabularies differ, or a resumed run has another model or seed.
        TrainingError: training diverged, or there was no time for a step.
    """
    keep_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    if tokenizer.vocab_size != model_config.vocab_size:
        raise ConfigError(
            f"vocab_size is {model_config.vocab_size} in the model and {tokenizer.vocab_size} in "
            f"{tokenizer_dir / 'tokenizer.json'}"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    model = Transformer(model_config)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if start is not None:
        model.load_state_dict(_weights_of(start, model_config))
    trainer = Trainer(model, config, device)
    with ExitStack() as stack:
        log = stack.enter_context(ProgressLog(out_dir))
        session = _Session(trainer, tokenizer, out_dir, log, now, start)
        session.resume()
        reason = why_not_compile(device) if config.compile else None
        if reason:
            log.say(f"training without torch.compile, which makes it slower: {reason}")
        compiled = config.compile and not reason
        if config.num_processes > 1:
            if device != "cpu":
                raise ConfigError(f"num_processes is for CPUs; this run is on {device}")
            torch.set_num_threads(1)
            trainer.workers = stack.enter_context(
                GradientWorkers(model, config.num_processes, bf16=config.bf16, compiled=compiled)
            )
        if compiled:
            model.compile_for_training()
        session.train()
        if trainer.num_steps == 0:
            raise TrainingError("no step fitted into the time; give it more minutes")
        if trainer.num_skipped:
            log.say(f"{trainer.num_skipped} steps were skipped for non-finite values")
        if plot(out_dir) is None:
            log.say("no plot: matplotlib is not installed (pip install 'rorqual[train]')")
    path = out_dir / "model"
    save_model(trainer.model.cpu(), path)
    for name in _MODEL_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copy2(tokenizer_dir / name, path / name)
    return path


def _weights_of(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights of a finished model; raises ConfigError where it is another network."""
    source = load_model(path)
    if source.config != config:
        raise ConfigError(f"{path} has another config than the network to train")
    return source.state_dict()


class _Session:
    """One process's part of a run: the loop, its clock and what it leaves in the run directory."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        out_dir: Path,
        log: ProgressLog,
        now: Callable[[], float],
        start: Path | None,
    ) -> None:
        self._start = start
        self._trainer = trainer
        self._config = trainer.config
        self._tokenizer = tokenizer
        self._out_dir = out_dir
        self._log = log
        self._now = now
        self._started_s = now()
        self._data: BatchState | None = None
        self._settings = {
            "model": trainer.model.config.to_dict(),
            "train": trainer.config.to_dict(),
        }

    @property
    def _elapsed_s(self) -> float:
        """Seconds spent on the run, earlier sessions included."""
        return self._now() - self._started_s

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one. Raises ConfigError as ``run`` says."""
        path = latest_run_state(self._out_dir)
        if path is None:
            return
        state = load_run_state(path)
        changes = _changes(state["settings"], self._settings)
        for key, (theirs, ours) in changes.items():
            if key.startswith("model.") or key == "train.seed":
                raise ConfigError(
                    f"{path} was written with {key} = {theirs!r}, now it is {ours!r}; use another "
                    f"run directory"
                )
        self._trainer.load_state_dict(state["trainer"])
        drop_rows_after(self._out_dir, self._trainer.num_steps)
        self._data = BatchState.from_dict(state["data"]) if state["data"] else None
        self._started_s = self._now() - float(state["spent_s"])
        self._log.say(
            f"resumed at step {self._trainer.num_steps}, {self._trainer.num_tokens} tokens"
        )
        for key, (theirs, ours) in changes.items():
            self._log.say(f"{key} is now {ours!r}; it was {theirs!r}")

    def train(self) -> None:
        """Step until the schedule ends. Writes a checkpoint however it ends."""
        config, trainer = self._config, self._trainer
        held_out = HeldOutSet(self._tokenizer) if config.eval_minutes else None
        maker = BatchMaker(
            self._tokenizer,
            seed=config.seed,
            tokens_per_step=config.tokens_per_step,
            min_rows=config.num_processes,  # a row is not shared: one process would wait
            state=self._data,
        )
        saved_s = evaluated_s = self._elapsed_s
        evaluated_step = -1
        self._describe()
        with Prefetcher(maker) as batches:
            try:
                while (progress := progress_at(config, trainer.num_steps, self._elapsed_s)) < 1.0:
                    self._step(batches, progress)
                    if self._elapsed_s - saved_s >= 60 * config.checkpoint_minutes:
                        self._save()
                        saved_s = self._elapsed_s
                    if held_out and self._elapsed_s - evaluated_s >= 60 * config.eval_minutes:
                        self._evaluate(held_out)
                        evaluated_s, evaluated_step = self._elapsed_s, trainer.num_steps
            finally:
                self._save()
        if held_out and evaluated_step != trainer.num_steps:
            self._evaluate(held_out)
        self._describe()

    def _step(self, batches: Prefetcher, progress: float) -> None:
        config, trainer = self._config, self._trainer
        begun_s = self._elapsed_s
        stage = stage_index(config, progress)
        then = stage_index(config, progress_at(config, trainer.num_steps + 1, begun_s))
        batch = batches.next(config.stages[stage].difficulty, config.stages[then].difficulty)
        losses, norm, rate = trainer.step(batch, progress)
        self._data = batch.state
        row = StepRow(
            step=trainer.num_steps,
            tokens=trainer.num_tokens,
            loss=losses.main,
            by_task=losses.by_task,
            mtp_loss=losses.mtp,
            indexer_loss=losses.indexer,
            grad_norm=norm,
            learning_rate=rate,
            tokens_per_s=batch.pack.num_tokens / max(1e-9, self._elapsed_s - begun_s),
            padding=batch.pack.padding_fraction,
            stage=stage,
            wall_s=self._elapsed_s,
        )
        self._log.step(row, progress)

    def _save(self) -> None:
        state = {
            "trainer": self._trainer.state_dict(),
            "data": self._data.to_dict() if self._data else None,
            "settings": self._settings,
            "spent_s": self._elapsed_s,
        }
        save_run_state(self._out_dir, self._trainer.num_steps, state)

    def _evaluate(self, held_out: HeldOutSet) -> None:
        trainer = self._trainer
        rows = held_out.evaluate(trainer.model, trainer.device, bf16=self._config.bf16)
        self._log.evaluation(trainer.num_steps, trainer.num_tokens, self._elapsed_s, rows)

    def _describe(self) -> None:
        """Write ``run.json``: what the card of the trained model says of its training."""
        description = {
            **self._settings,
            "machine": describe_machine(self._trainer.device),
            "start": str(self._start) if self._start else None,
            "steps": self._trainer.num_steps,
            "tokens": self._trainer.num_tokens,
            "wall_s": round(self._elapsed_s, 1),
        }
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        (self._out_dir / RUN_FILE).write_text(text, "utf-8")


def _changes(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as ``part.name`` -> (old, new)."""
    return {
        f"{part}.{key}": (theirs[part].get(key), ours[part].get(key))
        for part in ours
        for key in sorted(set(theirs[part]) | set(ours[part]))
        if theirs[part].get(key) != ours[part].get(key)
    }
