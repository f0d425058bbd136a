"""Convert a checkpoint between the official and the transformers layout, shard by shard.

Being written; the signature below is final.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes_done, bytes_total)`` after each tensor; returns nothing."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    to: Literal["official", "transformers"],
    dtype: Literal["keep", "bf16", "fp32"] = "keep",
    experts: Literal["keep", "fp8"] = "keep",
    max_shard_bytes: int = 4 * 2**30,
    progress: Progress | None = None,
) -> int:
    """Write the checkpoint in directory ``src`` to directory ``dst`` in layout ``to``.

    Returns the number of tensor bytes written. Raises CheckpointError naming file and tensor.
    """
    raise NotImplementedError
