"""What one core of this machine does: the two numbers that predictions are made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Of one core, measured."""

    flops: float
    """Float32 operations per CPU-second in numpy's product of two 1024 x 1024 matrices."""
    bytes_per_s: float
    """Bytes read per CPU-second in numpy's dot product of two arrays."""
    working_set_bytes: int
    """Of both arrays: what fits into a cache is read faster."""

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least a part can take that computes ``flops`` on ``nbytes`` read once."""
        return max(flops / self.flops, nbytes / self.bytes_per_s)

    @property
    def words(self) -> str:
        """One line."""
        return (
            f"one core: {self.flops / 1e9:.0f} GFLOP/s in numpy's float32 product, "
            f"{self.bytes_per_s / 1e9:.1f} GB/s reading {self.working_set_bytes / 1e6:.0f} MB"
        )


def measure_roof(working_set_bytes: int = 256 << 20, seconds: float = _SECONDS) -> Roof:
    """Measure both limits in about ``2 * seconds`` of CPU time; numpy should use one thread."""
    a = np.ones((1024, 1024), np.float32)
    half = np.ones(max(1, working_set_bytes // 8), np.float32)
    other = half.copy()
    product = cpu_time(lambda repeat: [a @ a for _ in range(repeat)], seconds)
    reading = cpu_time(lambda repeat: [half.dot(other) for _ in range(repeat)], seconds)
    return Roof(
        flops=2 * 1024**3 / product,
        bytes_per_s=2 * half.nbytes / reading,
        working_set_bytes=2 * half.nbytes,
    )


def cpu_time(run: Callable[[int], object], seconds: float) -> float:
    """CPU seconds of one repetition of ``run(repetitions)``, the fastest of three tries."""
    run(1)
    repeat = 1
    while True:
        start = time.process_time()
        run(repeat)
        took = time.process_time() - start
        if took > seconds / 12:
            break
        repeat *= 4
    repeat = max(1, round(repeat * seconds / 3 / took))
    tries = []
    for _ in range(3):
        start = time.process_time()
        run(repeat)
        tries.append((time.process_time() - start) / repeat)
    return min(tries)
