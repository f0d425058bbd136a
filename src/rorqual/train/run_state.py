"""Checkpoints of a training run: written atomically, the last two kept, read as data only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rorqual.errors import CheckpointError

KEEP = 2
_PREFIX = "step-"


def save_run_state(run_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors and plain data) for ``step``; then delete all but the last two.

    A reader sees a whole file or none: the write goes to a temporary name and is renamed.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in _all(folder)[:-KEEP]:
        old.unlink()
    return path


def latest_run_state(run_dir: Path) -> Path | None:
    """The newest checkpoint in ``run_dir``, or None."""
    paths = _all(run_dir / "checkpoints")
    return paths[-1] if paths else None


def load_run_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises CheckpointError naming the file if it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        raise CheckpointError(f"{path}: not a readable training checkpoint: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a training checkpoint")
    return state


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*.pt"))
