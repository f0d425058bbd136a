"""The curves of ``long`` as a picture: measured beside predicted over the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.bench.figure import figure_in

if TYPE_CHECKING:
    from rorqual.bench.long import LongRow

_PANELS: tuple[tuple[str, tuple[tuple[str, Callable[[LongRow], float]], ...]], ...] = (
    (
        "decode, tokens per CPU-second",
        (
            ("measured", lambda row: row.decode_tokens_per_cpu_s),
            ("predicted", lambda row: row.predicted_decode),
        ),
    ),
    (
        "prefill, tokens per CPU-second",
        (
            ("measured", lambda row: row.prefill_tokens_per_cpu_s),
            ("predicted", lambda row: row.predicted_prefill),
        ),
    ),
    (
        "memory, MB",
        (
            ("cache, measured", lambda row: row.cache_bytes / 1e6),
            ("cache, formula", lambda row: row.formula_bytes / 1e6),
            ("resident, all", lambda row: row.rss_bytes / 1e6),
        ),
    ),
)


def plot(path: Path, rows: Sequence[LongRow]) -> None:
    """Draw three panels; log axes.

    Raises:
        ConfigError: as ``figure_in``.
    """
    contexts = [row.context_tokens for row in rows]
    with figure_in(path, (13, 4)) as figure:
        for axes, (label, curves) in zip(figure.subplots(1, 3), _PANELS, strict=True):
            for name, value in curves:
                values = [value(row) for row in rows]
                style = "--" if name in ("predicted", "cache, formula") else "-"
                axes.plot(contexts, values, style, marker=".", label=name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("context, tokens")
            axes.set_ylabel(label)
            axes.grid(visible=True, which="both", alpha=0.3)
            axes.legend()
