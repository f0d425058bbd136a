"""Start latency per substrate as a picture: one bar each, the raw tool's beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.bench.figure import figure_in

if TYPE_CHECKING:
    from rorqual.bench.sandbox_rows import SandboxRow


def plot(path: Path, rows: Sequence[SandboxRow]) -> None:
    """Draw the measurements in milliseconds on a log axis.

    Raises:
        ConfigError: as ``figure_in``.
    """
    shown = [row for row in reversed(rows) if row.unit == "ms"]
    with figure_in(path, (9, 0.34 * len(shown) + 1.2), dpi=110) as figure:
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(places, [row.median for row in shown], 0.6, label="rorqual, median")
        beside = [(place, row) for place, row in zip(places, shown, strict=True) if row.raw]
        axes.plot(
            [row.raw_median for _, row in beside], [at for at, _ in beside], "kd", label="raw tool"
        )
        aimed = [(place, row) for place, row in zip(places, shown, strict=True) if row.target]
        axes.plot(
            [row.target for _, row in aimed], [at for at, _ in aimed], "r|", ms=14, label="target"
        )
        axes.set_yticks(list(places), [f"{row.substrate}: {row.measure}" for row in shown])
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.grid(visible=True, axis="x", alpha=0.3)
        axes.legend(loc="upper right")
