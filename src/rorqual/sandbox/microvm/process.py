"""QEMU as a process: started by the shim in its control groups, ended without a trace.

As root, QEMU runs as nobody, and dies with the shim; whatever kills this process also ends both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError, SandboxFailedError, SandboxLostError, SubstrateMissingError
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.contract import MIB, Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.console import Console
from rorqual.sandbox.microvm.qmp import Qmp

NOBODY = 65534
END_S = 15.0
OVERHEAD_BYTES = 256 * MIB
"""QEMU's own memory: translated code, device queues, a saved state under way."""

QEMU_THREADS = 64


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


class Machine:
    """A running QEMU and the sockets to it. Made by `start_machine`; end it with `end`."""

    def __init__(
        self, directory: Path, life: socket.socket, agent: socket.socket, qmp: Qmp, console: Console
    ) -> None:
        self.directory = directory
        self.agent = agent
        self.qmp = qmp
        self.console = console
        self._life: socket.socket | None = life

    def stop_now(self) -> None:
        """Begin to end it; returns at once."""
        if self._life is not None:
            with contextlib.suppress(OSError):
                self._life.shutdown(socket.SHUT_WR)

    async def end(self) -> None:
        """End it, and return when no process, group or file of it is left.

        Raises:
            SandboxFailedError: the shim did not finish in time.
        """
        life, self._life = self._life, None
        if life is None:
            return
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError):
                life.shutdown(socket.SHUT_WR)  # the shim kills QEMU, cleans up and leaves
            async with asyncio.timeout(END_S):
                with contextlib.suppress(OSError):
                    while await loop.sock_recv(life, 1):
                        pass
        except TimeoutError:
            raise SandboxFailedError(f"{self.directory.name} did not end in {END_S:g} s") from None
        finally:
            life.close()
            self.qmp.close()
            self.console.close()
            with contextlib.suppress(OSError):
                self.agent.close()
        if self.directory.exists():
            from rorqual.sandbox.container.remains import remove_remains

            await asyncio.to_thread(remove_remains, self.directory)


Arguments = Callable[[dict[str, int]], list[str]]


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
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    cgroup = _make_cgroup(id, limits, ram_bytes, threads)
    life: socket.socket | None = None
    with contextlib.ExitStack() as closing, tempfile.TemporaryFile() as log:
        try:
            pairs = {name: socket.socketpair() for name in ("agent", "control", "console")}
            for _, theirs in pairs.values():
                closing.callback(theirs.close)
            given = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
            for name, (path, flags) in files.items():
                given[name] = os.open(path, flags | os.O_CLOEXEC)
                closing.callback(os.close, given[name])
            first = max(*given.values(), log.fileno()) + 8  # above every source of a copy
            numbers = {name: first + number for number, name in enumerate(given)}
            command = [str(layout.shim()), str(directory)]
            if cgroup is not None:
                for at in cgroup.directories.values():
                    command += ["--cgroup", str(at)]
                for at in cgroup.residues:
                    command += ["--residue", str(at)]
            command += ["--life", "--", *_unprivileged(), qemu.program, *arguments(numbers)]
            copies = [(given[name], numbers[name]) for name in given]
            life = await asyncio.to_thread(_spawn, command, copies, log.fileno(), first - 1)
        except BaseException:
            await asyncio.to_thread(_forget, directory, cgroup)
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


def _make_cgroup(id: str, limits: Limits, ram_bytes: int, threads: int) -> Cgroup | None:
    hierarchy = find_hierarchy() if os.geteuid() == 0 else None
    if hierarchy is None:
        return None
    cgroup = Cgroup(hierarchy, id)
    cgroup.create(
        Limits(
            memory_bytes=ram_bytes,
            disk_bytes=OVERHEAD_BYTES,
            cpus=limits.cpus,
            processes=QEMU_THREADS + threads,
        )
    )
    return cgroup


def _unprivileged() -> list[str]:
    """A wrapper that ends QEMU with the shim and, as root, makes it nobody."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SubstrateMissingError("setpriv is not installed: apt-get install util-linux")
    command = [setpriv, "--pdeathsig", "KILL", "--no-new-privs"]
    if os.geteuid() == 0:
        command += [f"--reuid={NOBODY}", f"--regid={NOBODY}"]
        try:
            command.append(f"--groups={os.stat('/dev/kvm').st_gid}")
        except OSError:
            command.append("--clear-groups")
    return [*command, "--"]


def _spawn(
    command: list[str], copies: Sequence[tuple[int, int]], log: int, spare: int
) -> socket.socket:
    """Start the shim; returns the socket whose end means that everything is gone."""
    life, shims_life = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Number 3 may be the source of another copy: the others are made first.
        actions: list[tuple[int, int] | tuple[int, int, int]] = [
            *((os.POSIX_SPAWN_DUP2, source, target) for source, target in copies),
            (os.POSIX_SPAWN_DUP2, shims_life.fileno(), spare),
            (os.POSIX_SPAWN_DUP2, log, spare - 1),
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, null, 1),
            (os.POSIX_SPAWN_DUP2, spare - 1, 2),
            (os.POSIX_SPAWN_DUP2, spare, 3),
            (os.POSIX_SPAWN_CLOSE, spare),
            (os.POSIX_SPAWN_CLOSE, spare - 1),
        ]
        environment = {"PATH": os.defpath + ":/usr/sbin:/sbin"}
        pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status = os.waitpid(pid, 0)  # the shim puts itself in the background at once
        if status != 0:
            raise SandboxFailedError("the shim could not start")
    except (OSError, SandboxError) as error:
        life.close()
        raise SandboxFailedError(f"the shim could not start: {error}") from error
    finally:
        shims_life.close()
        os.close(null)
    life.setblocking(False)
    return life


def _forget(directory: Path, cgroup: Cgroup | None) -> None:
    if cgroup is not None:
        cgroup.remove()
    shutil.rmtree(directory, ignore_errors=True)
