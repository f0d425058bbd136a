"""Measurements of the guest machines: new ones from a template, forks of a running one, memory.

A template is what the first start of a kind leaves: every later start is a fork of it. A fork of a
running sandbox is something else: its memory has to be saved first.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rorqual.bench.sandbox_raw import private_mb, raw_template_fork
from rorqual.bench.sandbox_rows import TRUE, Bench, SandboxRow, row_of, timed_fork
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.process import find_qemu
from rorqual.sandbox.microvm.sandbox import MachineSandbox, MicroVMSandbox
from rorqual.sandbox.microvm.template import Template, TemplateStore
from rorqual.sandbox.sandbox import Sandbox

CLONES = 4
"""Alive at once while their memory is read."""

_ANY_TRUE = ("true",)
"""A vm's disk is the caller's: nobody knows where it keeps its programs."""

_RUNNING_MS, _FIRST_EXEC_MS, _EACH_MB = 80.0, 350.0, 20.0


async def template_forks(bench: Bench) -> list[SandboxRow]:
    """New microVMs from a ready template: until they run, until their first command has ended."""
    name = "microvm, from a template"
    qemu = find_qemu()
    store = TemplateStore(Layout(bench.root), qemu)
    async with await bench.create("microvm") as sandbox:  # makes the template if there is none
        assert isinstance(sandbox, MicroVMSandbox)
        template = await store.booted(sandbox.hardware)

    async def running() -> float:
        started = time.perf_counter()
        machine = await store.run(template, state=template.devices)
        try:
            await machine.qmp.execute("cont")
            return (time.perf_counter() - started) * 1000
        finally:
            await machine.end()

    created: list[float] = []

    async def first_exec() -> float:
        started = time.perf_counter()
        async with await bench.create("microvm") as sandbox:
            created.append((time.perf_counter() - started) * 1000)
            (await sandbox.exec(TRUE)).check()
            return (time.perf_counter() - started) * 1000

    raw = ("qemu -incoming", lambda: raw_template_fork(template, qemu)[0])
    ran = await bench.row(name, "running", running, raw, target=_RUNNING_MS)
    executed = await bench.row(name, "first exec", first_exec, target=_FIRST_EXEC_MS)
    agent = row_of(name, "create returns", "ms", created[1:])
    return [ran, agent, executed, *await _memory(bench, name, template)]


async def _memory(bench: Bench, name: str, template: Template) -> list[SandboxRow]:
    """Private memory of each of some clones that live together, before and after a command."""
    clones: list[Sandbox] = []
    try:
        for _ in range(CLONES):
            clones.append(await bench.create("microvm"))
        before = [private_mb(_qemu_of(clone)) for clone in clones]
        for clone in clones:
            (await clone.exec(TRUE)).check()
        after = [private_mb(_qemu_of(clone)) for clone in clones]
    finally:
        for clone in clones:
            await clone.kill()
    raw = raw_template_fork(template, find_qemu())[1]
    rows = [
        row_of(name, "private memory, running", "MB", before, target=_EACH_MB),
        row_of(name, "private memory, after first exec", "MB", after, target=_EACH_MB),
    ]
    return [replace(rows[0], raw="qemu -incoming", raw_median=raw), rows[1]]


async def machine_starts(
    bench: Bench, substrate: Literal["microvm", "vm"], image: Path | None = None
) -> list[SandboxRow]:
    """Forks of a running machine and, for a vm, its whole start."""
    rows = []

    async def cold() -> float:
        started = time.perf_counter()
        async with await bench.create(substrate, image=image) as sandbox:
            (await sandbox.exec(_ANY_TRUE)).check()
        return (time.perf_counter() - started) * 1000

    if substrate == "vm":
        rows.append(await bench.row(substrate, "boot to first exec", cold))
    first_exec: list[float] = []
    async with await bench.create(substrate, image=image) as sandbox:

        async def fork() -> float:
            return await timed_fork(sandbox, first_exec, _ANY_TRUE)

        rows.append(await bench.row(substrate, "fork of a running one", fork))
        rows.append(row_of(substrate, "fork of a running one, first exec", "ms", first_exec[1:]))
    return rows


def _qemu_of(sandbox: Sandbox) -> int:
    assert isinstance(sandbox, MachineSandbox)
    shim = int((sandbox.directory / "lock").read_text().split()[0])
    (child,) = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
    return int(child)
