"""The engines of ``speed`` as a picture: decode tokens per CPU-second over the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rorqual.errors import ConfigError


def plot(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Draw the rows of ``engine_speed.csv``: decode on the left, prefill on the right; log axes.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "the plot needs matplotlib, which is not installed: pip install 'rorqual[train]'"
        ) from None
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        for engine in engines:
            own = [row for row in rows if row["engine"] == engine]
            axes.plot(
                [int(row["prompt_tokens"]) for row in own],
                [float(row[f"{phase}_tokens_per_cpu_s"]) for row in own],
                marker=".",
                label=engine,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"{phase}, tokens per CPU-second")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    try:  # the same bytes from the same rows
        with matplotlib.rc_context({"svg.hashsalt": "rorqual"}):
            figure.savefig(path, dpi=120, metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
