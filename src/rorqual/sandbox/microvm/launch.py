"""A program that runs a guest machine, as a process: started by the shim, ended without a trace.

As root the program runs as nobody in control groups of its own; it dies with the shim, and whatever
kills this process also ends both. What the program is told is its driver's matter: process.py for
QEMU, firecracker.py for Firecracker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from rorqual.errors import SandboxError, SandboxFailedError, SubstrateMissingError
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.contract import MIB, Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.console import Console

NOBODY = 65534
END_S = 15.0
OVERHEAD_BYTES = 256 * MIB
"""The program's own memory: translated code, device queues, a saved state under way."""

PROGRAM_THREADS = 64


class MachineProcess(ABC):
    """A running machine. End it with `end`.

    Attributes:
        directory: what it has on this machine's disk; its name is the sandbox's id.
        console: what the guest's kernel said.
    """

    def __init__(self, directory: Path, life: socket.socket, console: Console) -> None:
        self.directory = directory
        self.console = console
        self._life: socket.socket | None = life

    @abstractmethod
    async def pause(self) -> None:
        """Stop the guest's processors."""

    @abstractmethod
    async def resume(self) -> None:
        """Let them go on."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open towards it; it goes on."""

    @property
    def is_running(self) -> bool:
        """Whether the program has not ended."""
        if self._life is None:
            return False
        try:
            return self._life.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

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
                life.shutdown(socket.SHUT_WR)  # the shim kills the program, cleans up and leaves
            async with asyncio.timeout(END_S):
                with contextlib.suppress(OSError):
                    while await loop.sock_recv(life, 1):
                        pass
        except TimeoutError:
            raise SandboxFailedError(f"{self.directory.name} did not end in {END_S:g} s") from None
        finally:
            life.close()
            self.close()
            self.console.close()
        if self.directory.exists():
            from rorqual.sandbox.container.remains import remove_remains

            await asyncio.to_thread(remove_remains, self.directory)


Arguments = Callable[[dict[str, int]], list[str]]


async def launch(
    command: Arguments,
    given: dict[str, int],
    *,
    directory: Path,
    layout: Layout,
    limits: Limits,
    ram_bytes: int,
    threads: int = 0,
    log: int,
) -> socket.socket:
    """Start a program; returns the socket whose end means that everything of it is gone.

    Args:
        command: from descriptor numbers by name (those of `given`) to the program and its
            arguments, the wrapper of `unprivileged` included.
        directory: made here, and removed with all in it when the program has ended.
        limits: only `cpus` is used; memory is the guest's and the program's own.
        log: descriptor that gets what the program and the shim say.

    Raises:
        SandboxFailedError: the shim could not start.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    cgroup = _make_cgroup(directory.name, limits, ram_bytes, threads)
    try:
        first = max(*given.values(), log) + 8  # above every source of a copy
        numbers = {name: first + number for number, name in enumerate(given)}
        shim = [str(layout.shim()), str(directory)]
        if cgroup is not None:
            for at in cgroup.directories.values():
                shim += ["--cgroup", str(at)]
            for at in cgroup.residues:
                shim += ["--residue", str(at)]
        shim += ["--life", "--", *command(numbers)]
        copies = [(given[name], numbers[name]) for name in given]
        return await asyncio.to_thread(_spawn, shim, copies, log, first - 1)
    except BaseException:
        await asyncio.to_thread(_forget, directory, cgroup)
        raise


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
            processes=PROGRAM_THREADS + threads,
        )
    )
    return cgroup


def unprivileged() -> list[str]:
    """A wrapper that ends a program with the shim and, as root, makes it nobody."""
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
