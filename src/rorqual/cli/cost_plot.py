"""The curves of ``rorqual cost`` as a picture: operations and cache over the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.bench.figure import figure_in

if TYPE_CHECKING:
    from rorqual.model.economics import Point


def plot(path: Path, points: Sequence[Sequence[Point]]) -> None:
    """Draw two panels, one line per model; log axes.

    Args:
        points: one row per context, one point per model.

    Raises:
        ConfigError: as ``figure_in``.
    """
    panels: tuple[tuple[str, Callable[[Point], float]], ...] = (
        ("decode, G FP8 operations per token", lambda p: p.decode.cost / 1e9),
        ("cache of one sequence, GB", lambda p: p.cache_bytes / 1e9),
    )
    with figure_in(path, (10, 4.2)) as figure:
        for axes, (label, value) in zip(figure.subplots(1, 2), panels, strict=True):
            for line in zip(*points, strict=True):
                contexts = [point.context for point in line]
                axes.plot(contexts, [value(p) for p in line], marker=".", label=line[0].name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("context, tokens")
            axes.set_ylabel(label)
            axes.grid(visible=True, which="major", alpha=0.3)
            axes.legend()
