"""A report of what a model is and costs, from a preset, a config or a checkpoint directory.

Being written; the signatures below are final.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from rorqual.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything ``render`` prints; plain data (more fields are coming)."""

    name: str
    config: ModelConfig


def inspect_model(source: str | Path) -> Inspection:
    """Inspect a preset name, a ``config.json`` path or a checkpoint directory (headers only).

    Raises ConfigError (unknown name, bad config) or CheckpointError (damaged files).
    """
    raise NotImplementedError


def render(inspection: Inspection) -> RenderableType:
    """The report as a rich renderable."""
    raise NotImplementedError
