"""Rows of the sandbox benchmark, and how one is timed: ours and the raw tool in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rorqual.sandbox.sandbox import Sandbox

Unit = Literal["ms", "s", "MB"]
Step = Callable[[], Awaitable[float]]
RawStep = tuple[str, Callable[[], float]]
"""Name of the raw tool, and one run of it."""

TRUE = ("/usr/bin/true",)


@dataclass(frozen=True, kw_only=True)
class SandboxRow:
    """One measurement.

    Attributes:
        median, worst: of ours, in `unit`.
        raw: the tool beside us, empty where there is none.
        raw_median: of it, 0 where there is none.
        target: what ours is to stay at or below, 0 where nothing is set.
    """

    substrate: str
    measure: str
    unit: Unit
    median: float
    worst: float
    raw: str
    raw_median: float
    target: float
    repetitions: int

    @property
    def verdict(self) -> Literal["", "met", "missed"]:
        """Whether the target holds; empty where there is none."""
        if not self.target:
            return ""
        return "met" if self.median <= self.target else "missed"

    def aiming_at(self, target: float) -> SandboxRow:
        """The same with a target."""
        return replace(self, target=target)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every measurement is given.

    Attributes:
        repetitions: of each step; one more, which may build something, is not counted.
        root: as in `Sandbox.create`.
    """

    repetitions: int
    root: Path | None

    async def create(self, substrate: Any, **options: Any) -> Sandbox:
        """As `Sandbox.create`, below this benchmark's root."""
        return await Sandbox.create(substrate, root=self.root, **options)

    async def row(
        self,
        substrate: str,
        measure: str,
        ours: Step,
        raw: RawStep | None = None,
        target: float = 0.0,
    ) -> SandboxRow:
        """Ours and the raw tool in turn; all in milliseconds."""
        await ours()
        times, raw_times = [], []
        for _ in range(self.repetitions):
            times.append(await ours())
            if raw is not None:
                raw_times.append(raw[1]())
        row = row_of(substrate, measure, "ms", times, target=target)
        if raw is None:
            return row
        return replace(row, raw=raw[0], raw_median=statistics.median(raw_times))


def row_of(
    substrate: str, measure: str, unit: Unit, values: Sequence[float], *, target: float = 0.0
) -> SandboxRow:
    """A row of values that were taken without a raw tool beside them."""
    return SandboxRow(
        substrate=substrate,
        measure=measure,
        unit=unit,
        median=statistics.median(values),
        worst=max(values),
        raw="",
        raw_median=0.0,
        target=target,
        repetitions=len(values),
    )


async def timed(work: Awaitable[Any]) -> float:
    """Milliseconds of a command, which must succeed."""
    started = time.perf_counter()
    (await work).check()
    return (time.perf_counter() - started) * 1000


async def timed_fork(
    sandbox: Sandbox, first_exec: list[float], command: Sequence[str] = TRUE
) -> float:
    """Milliseconds until a fork is there; adds those until its first command ended."""
    started = time.perf_counter()
    (fork,) = await sandbox.fork()
    async with fork:
        there = (time.perf_counter() - started) * 1000
        (await fork.exec(command)).check()
        first_exec.append((time.perf_counter() - started) * 1000)
    return there
