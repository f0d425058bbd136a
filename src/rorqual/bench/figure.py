"""A picture on its way into a file: what every plot checks before it draws and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")


@contextmanager
def figure_in(path: Path, size: tuple[float, float], *, dpi: int = 120) -> Iterator[Figure]:
    """An empty figure of ``size`` inches, saved to ``path`` once it is drawn.

    Raises:
        ConfigError: the name has another suffix than a picture's, matplotlib is not installed, or
            the file cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a plot ends in {', '.join(_SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'rorqual[train]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
