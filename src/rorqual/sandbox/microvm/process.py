"""QEMU as a process: what it inherits, its control socket, the agent's line, the console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxFailedError, SandboxLostError, SubstrateMissingError
from rorqual.sandbox.contract import Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.console import Console
from rorqual.sandbox.microvm.launch import Arguments, MachineProcess, launch, unprivileged
from rorqual.sandbox.microvm.qmp import Qmp


@dataclass(frozen=True)
class Qemu:
    """An installed emulator."""

    program: str
    version: str


def find_qemu() -> Qemu:
    """The emulator of this machine.

    Raises:
        SubstrateMissingError: it is not installed.
    """
    program = shutil.which("qemu-system-x86_64")
    if program is None or os.uname().machine != "x86_64":
        raise SubstrateMissingError(
            "qemu-system-x86_64 is not installed (or this is no x86-64 machine): "
            "apt-get install --no-install-recommends qemu-system-x86 qemu-utils"
        )
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\S+)", said.stdout)
    if found is None:
        raise SubstrateMissingError(f"{program} does not start: {said.stderr.strip()[-300:]}")
    return Qemu(program, found[1])


class Machine(MachineProcess):
    """A running QEMU and the sockets to it. Made by `start_machine`; end it with `end`."""

    def __init__(
        self, directory: Path, life: socket.socket, agent: socket.socket, qmp: Qmp, console: Console
    ) -> None:
        super().__init__(directory, life, console)
        self.agent = agent
        self.qmp = qmp

    async def pause(self) -> None:
        await self.qmp.execute("stop")

    async def resume(self) -> None:
        await self.qmp.execute("cont")

    def close(self) -> None:
        self.qmp.close()
        with contextlib.suppress(OSError):
            self.agent.close()


async def start_machine(
    qemu: Qemu,
    arguments: Arguments,
    files: dict[str, tuple[Path, int]],
    *,
    layout: Layout,
    id: str,
    limits: Limits,
    ram_bytes: int,
    threads: int = 0,
) -> Machine:
    """Start QEMU and greet its control socket.

    Args:
        arguments: from descriptor numbers by name (those of `files` and ``agent``, ``control``,
            ``console``) to QEMU's arguments.
        files: name -> path and flags to open it with.
        limits: only `cpus` is used; memory is the guest's and QEMU's own.

    Raises:
        SandboxFailedError: it did not start; the message has what it said.
    """
    directory = layout.sandboxes / id
    with contextlib.ExitStack() as closing, tempfile.TemporaryFile() as log:
        pairs = {name: socket.socketpair() for name in ("agent", "control", "console")}
        for _, theirs in pairs.values():
            closing.callback(theirs.close)
        given = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        try:
            for name, (path, flags) in files.items():
                given[name] = os.open(path, flags | os.O_CLOEXEC)
                closing.callback(os.close, given[name])
            life = await launch(
                lambda numbers: [*unprivileged(), qemu.program, *arguments(numbers)],
                given,
                directory=directory,
                layout=layout,
                limits=limits,
                ram_bytes=ram_bytes,
                threads=threads,
                log=log.fileno(),
            )
        except BaseException:
            for mine, _ in pairs.values():
                mine.close()
            shutil.rmtree(directory, ignore_errors=True)  # the caller may have put things there
            raise
        ours = {name: mine for name, (mine, _) in pairs.items()}
        console = Console(ours["console"])
        ours["agent"].setblocking(False)
        machine = Machine(directory, life, ours["agent"], Qmp(ours["control"]), console)
        closing.close()  # QEMU has its copies: its end is now visible as the sockets' end
        try:
            await asyncio.wait_for(machine.qmp.open(), 30.0)
        except (SandboxLostError, TimeoutError) as error:
            log.seek(0)
            said = log.read(2000).decode("utf-8", "replace").strip()
            await machine.end()
            raise SandboxFailedError(f"QEMU did not start: {said or error}") from error
        except BaseException:
            await machine.end()
            raise
        return machine
