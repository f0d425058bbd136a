"""``rorqual bench sandbox``: how long sandboxes take to start, run, fork, beside the raw tools.

Each repetition times ours and the raw tool one after the other, so that both meet the same machine;
medians are compared. A substrate that does not work here is left out, with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rorqual.bench.report import conditions, print_conditions, table, write_csv
from rorqual.bench.sandbox_raw import RawTools, available_bytes
from rorqual.errors import SandboxError
from rorqual.sandbox.sandbox import Sandbox

Unit = Literal["ms", "s", "MB"]
Step = Callable[[], Awaitable[float]]


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


@dataclass(frozen=True, kw_only=True)
class Left:
    """A substrate that was left out, and why."""

    substrate: str
    reason: str


_CONTAINERS = ("crun", "runc", "bubblewrap", "gvisor")
_COLD_FACTOR = 1.5
"""Cold to exit may take this times raw crun."""
_TRUE = ["/usr/bin/true"]


async def measure(
    repetitions: int, density: int, root: Path | None = None
) -> tuple[list[SandboxRow], list[Left]]:
    """Everything that works on this machine.

    Args:
        repetitions: of each step; the first, which may build something, is not counted.
        density: containers alive at once, 0 for none.
        root: as in `Sandbox.create`.
    """
    rows: list[SandboxRow] = []
    left: list[Left] = []
    with tempfile.TemporaryDirectory() as scratch, RawTools(Path(scratch)) as raw:
        bench = _Bench(repetitions, root, raw)
        parts: list[tuple[str, Callable[[], Awaitable[list[SandboxRow]]]]] = [
            ("function, JavaScript", lambda: bench.calls("JavaScript", ["js", "-e", "1"], 1.0)),
            ("function, Python", lambda: bench.calls("Python", ["python", "-c", "1"], 100.0)),
        ]
        for name in _CONTAINERS:
            parts.append((f"container, {name}", partial(bench.container, name)))
        parts.append(("container, gvisor", bench.memory_fork))
        parts.append(("microvm", lambda: bench.machine("microvm")))
        parts.append(("vm", lambda: bench.machine("vm")))
        if density:
            parts.append(("container, density", lambda: bench.density(density)))
        for name, part in parts:
            try:
                done = await part()
            except (SandboxError, OSError) as error:
                left.append(Left(substrate=name, reason=str(error)))
                continue
            rows += done
    return rows, left


class _Bench:
    def __init__(self, repetitions: int, root: Path | None, raw: RawTools) -> None:
        self._repetitions = repetitions
        self._root = root
        self._raw = raw

    async def _create(self, substrate: Any, **options: Any) -> Sandbox:
        return await Sandbox.create(substrate, root=self._root, **options)

    async def _row(
        self,
        substrate: str,
        measure: str,
        ours: Step,
        raw: tuple[str, Callable[[], float]] | None = None,
        target: float = 0.0,
    ) -> SandboxRow:
        """Ours and the raw tool in turn; all in milliseconds."""
        await ours()
        times, raw_times = [], []
        for _ in range(self._repetitions):
            times.append(await ours())
            if raw is not None:
                raw_times.append(raw[1]())
        return SandboxRow(
            substrate=substrate,
            measure=measure,
            unit="ms",
            median=statistics.median(times),
            worst=max(times),
            raw=raw[0] if raw is not None else "",
            raw_median=statistics.median(raw_times) if raw_times else 0.0,
            target=target,
            repetitions=self._repetitions,
        )

    async def calls(self, language: str, argv: list[str], target: float) -> list[SandboxRow]:
        """Calls of a warm engine; nothing is kept between them."""
        async with await self._create("function") as sandbox:

            async def call() -> float:
                return await _timed(sandbox.exec(argv))

            return [await self._row(f"function, {language}", "call", call, target=target)]

    async def container(self, isolation: str) -> list[SandboxRow]:
        """Cold to exit, and a command in one that runs."""
        name = f"container, {isolation}"

        async def cold() -> float:
            started = time.perf_counter()
            async with await self._create("container", isolation=isolation) as sandbox:
                (await sandbox.exec(_TRUE)).check()
            return (time.perf_counter() - started) * 1000

        raw = self._raw.cold(isolation)
        rows = [await self._row(name, "cold to exit", cold, raw)]
        if isolation == "crun" and raw is not None:
            rows[0] = _with_target(rows[0], _COLD_FACTOR * rows[0].raw_median)
        async with await self._create("container", isolation=isolation) as sandbox:

            async def warm() -> float:
                return await _timed(sandbox.exec(_TRUE))

            target = 6.0 if isolation != "gvisor" else 0.0
            rows.append(await self._row(name, "warm exec", warm, target=target))
        return rows

    async def memory_fork(self) -> list[SandboxRow]:
        """A gVisor sandbox with its processes: the first fork, then the fork's first command."""
        first_exec: list[float] = []

        async def fork() -> float:
            async with await self._create("container", isolation="gvisor") as sandbox:
                return await _fork(sandbox, first_exec)

        row = await self._row("container, gvisor", "fork, running", fork, target=400.0)
        return [row, _from_times("container, gvisor", "fork, first exec", first_exec[1:])]

    async def machine(self, substrate: Literal["microvm", "vm"]) -> list[SandboxRow]:
        """Start to the first command's end, and forks of one that runs."""

        async def cold() -> float:
            started = time.perf_counter()
            async with await self._create(substrate) as sandbox:
                (await sandbox.exec(_TRUE)).check()
            return (time.perf_counter() - started) * 1000

        rows = [await self._row(substrate, "start to first exec", cold)]
        first_exec: list[float] = []
        async with await self._create(substrate) as sandbox:
            if sandbox.capabilities.snapshot is None:
                return rows

            async def fork() -> float:
                return await _fork(sandbox, first_exec)

            targets = (80.0, 350.0) if substrate == "microvm" else (0.0, 0.0)
            rows.append(await self._row(substrate, "fork, running", fork, target=targets[0]))
            rows.append(
                _with_target(_from_times(substrate, "fork, first exec", first_exec[1:]), targets[1])
            )
        return rows

    async def density(self, count: int) -> list[SandboxRow]:
        """`count` live at once, started eight at a time: seconds, and memory of each."""
        gate = asyncio.Semaphore(8)
        alive: list[Sandbox] = []

        async def one() -> None:
            async with gate:
                alive.append(await self._create("container"))

        before = available_bytes()
        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(one())
            took = time.perf_counter() - started
            used = (before - available_bytes()) / count / 1e6
        finally:
            await asyncio.gather(*(sandbox.kill() for sandbox in alive))
        raw = self._raw.density(count)
        name = f"{count} live"
        common = {"substrate": "container, density", "worst": 0.0, "repetitions": 1}
        return [
            SandboxRow(
                **common,  # type: ignore[arg-type]
                measure=name,
                unit="s",
                median=took,
                raw="crun run --detach" if raw else "",
                raw_median=raw[0] if raw else 0.0,
                target=3.0,
            ),
            SandboxRow(
                **common,  # type: ignore[arg-type]
                measure=f"{name}, each",
                unit="MB",
                median=used,
                raw="crun run --detach" if raw else "",
                raw_median=raw[1] if raw else 0.0,
                target=2.0,
            ),
        ]


async def _timed(work: Awaitable[Any]) -> float:
    started = time.perf_counter()
    (await work).check()
    return (time.perf_counter() - started) * 1000


async def _fork(sandbox: Sandbox, first_exec: list[float]) -> float:
    """Milliseconds until a fork runs; adds those until its first command ended."""
    started = time.perf_counter()
    (fork,) = await sandbox.fork()
    async with fork:
        running = (time.perf_counter() - started) * 1000
        (await fork.exec(_TRUE)).check()
        first_exec.append((time.perf_counter() - started) * 1000)
    return running


def _from_times(substrate: str, measure: str, times: Sequence[float]) -> SandboxRow:
    return SandboxRow(
        substrate=substrate,
        measure=measure,
        unit="ms",
        median=statistics.median(times),
        worst=max(times),
        raw="",
        raw_median=0.0,
        target=0.0,
        repetitions=len(times),
    )


def _with_target(row: SandboxRow, target: float) -> SandboxRow:
    return SandboxRow(**{**vars(row), "target": target})


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; 1 where a target is missed."""
    header = conditions(["rorqual", "bench", "sandbox"], words)
    print_conditions(header)
    rows, left = asyncio.run(measure(args.repetitions, args.density, args.root))
    lines = [
        [
            f"{row.substrate}: {row.measure}",
            f"{row.median:.2f} {row.unit}",
            f"{row.raw_median:.2f}" if row.raw else "",
            row.raw,
            f"<= {row.target:.4g}" if row.target else "",
            "" if not row.target else "met" if row.median <= row.target else "missed",
        ]
        for row in rows
    ]
    print(table(["measurement", "median", "raw tool", "", "target", ""], lines))
    for one in left:
        print(f"left out: {one.substrate}: {one.reason}", file=sys.stderr)
    if args.csv is not None and rows:
        for one in left:
            header[f"left out, {one.substrate}"] = " ".join(one.reason.split())
        write_csv(args.csv, header, rows)
    if args.plot is not None and rows:
        from rorqual.bench.sandbox_plot import plot

        plot(args.plot, rows)
    return int(any(row.target and row.median > row.target for row in rows))
