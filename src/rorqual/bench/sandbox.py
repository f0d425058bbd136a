"""``rorqual bench sandbox``: how long sandboxes take to start, run, fork, beside the raw tools.

Each repetition times ours and the raw tool one after the other, so that both meet the same machine;
medians are compared. A substrate that does not work here is left out, with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rorqual.bench.report import conditions, print_conditions, table, write_csv
from rorqual.bench.sandbox_machine import machine_starts, template_forks
from rorqual.bench.sandbox_raw import RawTools, available_bytes
from rorqual.bench.sandbox_rows import TRUE, Bench, SandboxRow, row_of, timed, timed_fork
from rorqual.errors import SandboxError
from rorqual.sandbox.sandbox import Sandbox

_CONTAINERS = ("crun", "runc", "bubblewrap", "gvisor")
_COLD_FACTOR = 1.5
"""Cold to exit may take this times raw crun."""

_WARM_MS, _MEMORY_FORK_MS, _ALL_LIVE_S, _EACH_MB = 6.0, 400.0, 3.0, 2.0

Part = Callable[[], Awaitable[list[SandboxRow]]]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What was left out, and why."""

    name: str
    reason: str


async def measure(
    repetitions: int,
    density: int,
    *,
    root: Path | None = None,
    vm_image: Path | None = None,
    say: Callable[[str], None] = lambda name: None,
) -> tuple[list[SandboxRow], list[Left]]:
    """Everything that works on this machine.

    Args:
        repetitions: of each step; the first, which may build something, is not counted.
        density: containers alive at once, 0 for none.
        root: as in `Sandbox.create`.
        vm_image: a guest's disk; without it there are no rows of the vm.
        say: told what is measured next.
    """
    rows: list[SandboxRow] = []
    left: list[Left] = []
    bench = Bench(repetitions=repetitions, root=root)
    with tempfile.TemporaryDirectory() as scratch, RawTools(Path(scratch)) as raw:
        for name, part in _parts(bench, raw, density, vm_image):
            say(name)
            try:
                rows += await part()
            except (SandboxError, OSError) as error:
                left.append(Left(name=name, reason=str(error)))
    if vm_image is None:
        left.append(Left(name="vm", reason="it runs a disk of yours: --vm-image DISK"))
    return rows, left


def _parts(
    bench: Bench, raw: RawTools, density: int, vm_image: Path | None
) -> list[tuple[str, Part]]:
    javascript, python = ["js", "-e", "1"], ["python", "-c", "1"]
    parts: list[tuple[str, Part]] = [
        ("function, JavaScript", partial(_calls, bench, "JavaScript", javascript, 1.0)),
        ("function, Python", partial(_calls, bench, "Python", python, 100.0)),
    ]
    for name in _CONTAINERS:
        parts.append((f"container, {name}", partial(_container, bench, raw, name)))
    parts.append(("container, gvisor, forks", partial(_memory_fork, bench)))
    if density:
        parts.append(("container, density", partial(_density, bench, raw, density)))
    parts.append(("microvm, from a template", partial(template_forks, bench)))
    parts.append(("microvm", partial(machine_starts, bench, "microvm")))
    if vm_image is not None:
        parts.append(("vm", partial(machine_starts, bench, "vm", vm_image)))
    return parts


async def _calls(bench: Bench, language: str, argv: list[str], target: float) -> list[SandboxRow]:
    """Calls of a warm engine; nothing is kept between them."""
    async with await bench.create("function") as sandbox:

        async def call() -> float:
            return await timed(sandbox.exec(argv))

        return [await bench.row(f"function, {language}", "call", call, target=target)]


async def _container(bench: Bench, raw_tools: RawTools, isolation: str) -> list[SandboxRow]:
    """Cold to exit, and a command in one that runs."""
    name = f"container, {isolation}"

    async def cold() -> float:
        started = time.perf_counter()
        async with await bench.create("container", isolation=isolation) as sandbox:
            (await sandbox.exec(TRUE)).check()
        return (time.perf_counter() - started) * 1000

    raw = raw_tools.cold(isolation)
    rows = [await bench.row(name, "cold to exit", cold, raw)]
    if isolation == "crun" and raw is not None:
        rows[0] = rows[0].aiming_at(_COLD_FACTOR * rows[0].raw_median)
    async with await bench.create("container", isolation=isolation) as sandbox:

        async def warm() -> float:
            return await timed(sandbox.exec(TRUE))

        target = _WARM_MS if isolation != "gvisor" else 0.0
        rows.append(await bench.row(name, "warm exec", warm, target=target))
    return rows


async def _memory_fork(bench: Bench) -> list[SandboxRow]:
    """A gVisor sandbox with its processes: the first fork, then the fork's first command."""
    first_exec: list[float] = []

    async def fork() -> float:
        async with await bench.create("container", isolation="gvisor") as sandbox:
            return await timed_fork(sandbox, first_exec)

    name = "container, gvisor"
    row = await bench.row(name, "fork, running", fork, target=_MEMORY_FORK_MS)
    return [row, row_of(name, "fork, first exec", "ms", first_exec[1:])]


async def _density(bench: Bench, raw_tools: RawTools, count: int) -> list[SandboxRow]:
    """`count` live at once, started eight at a time: seconds, and memory of each."""
    gate = asyncio.Semaphore(8)
    alive: list[Sandbox] = []

    async def one() -> None:
        async with gate:
            alive.append(await bench.create("container"))

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
    raw = raw_tools.density(count)
    name, live = "container, density", f"{count} live"
    rows = [
        row_of(name, live, "s", [took], target=_ALL_LIVE_S),
        row_of(name, f"{live}, each", "MB", [used], target=_EACH_MB),
    ]
    if raw is None:
        return rows
    return [
        replace(row, raw="crun run --detach", raw_median=value)
        for row, value in zip(rows, raw, strict=True)
    ]


def summary(rows: Sequence[SandboxRow]) -> str:
    """How many targets hold, and which do not."""
    aimed = [row for row in rows if row.verdict]
    missed = [f"{row.substrate}: {row.measure}" for row in aimed if row.verdict == "missed"]
    said = f"{len(aimed) - len(missed)} of {len(aimed)} targets met"
    return f"{said}; missed: {'; '.join(missed)}" if missed else said


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; 1 where a target is missed."""
    header = conditions(["rorqual", "bench", "sandbox"], words)
    print_conditions(header)
    rows, left = asyncio.run(
        measure(
            args.repetitions,
            args.density,
            root=args.root,
            vm_image=args.vm_image.absolute() if args.vm_image is not None else None,
            say=lambda name: print(f"measuring {name}", file=sys.stderr, flush=True),
        )
    )
    lines = [
        [
            f"{row.substrate}: {row.measure}",
            f"{row.median:.2f} {row.unit}",
            f"{row.raw_median:.2f}" if row.raw else "",
            row.raw,
            f"<= {row.target:.4g}" if row.target else "",
            row.verdict,
        ]
        for row in rows
    ]
    print(table(["measurement", "median", "raw tool", "", "target", ""], lines))
    print(summary(rows))
    for one in left:
        print(f"left out: {one.name}: {one.reason}", file=sys.stderr)
    if args.csv is not None and rows:
        for one in left:
            header[f"left out, {one.name}"] = " ".join(one.reason.split())
        write_csv(args.csv, header, rows)
    if args.plot is not None and rows:
        from rorqual.bench.sandbox_plot import plot

        plot(args.plot, rows)
    return int(any(row.verdict == "missed" for row in rows))
