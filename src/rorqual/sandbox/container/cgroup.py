"""Control groups of one sandbox, version 1 and 2: create with limits, freeze, count OOM kills.

The shim joins the groups before it starts the runtime and removes them at the end. Directories are
found from the mount table; nothing here starts a process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import SandboxFailedError
from rorqual.sandbox.contract import Limits

_V1_CONTROLLERS = ("memory", "pids", "cpu", "freezer")
_CPU_PERIOD_US = 100_000
_PARENT = "rorqual"
RESERVED_PROCESSES = 16
"""Room for the agent and its monitors beside the processes a caller was promised."""


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups can be made.

    Attributes:
        version: 2 if the unified hierarchy has the controllers, else 1.
        roots: controller -> directory in which sandboxes' groups are made (one entry "" in v2).
        unified: mount point of an empty version-2 hierarchy beside version 1, which some runtimes
            refuse to see.
        others: directories in which a runtime may make groups although nothing is limited there.
    """

    version: Literal[1, 2]
    roots: dict[str, Path]
    unified: Path | None
    others: tuple[Path, ...] = ()


def find_hierarchy() -> Hierarchy | None:
    """The usable hierarchy of this machine, or None if groups cannot be made here."""
    hierarchy = _found_before()
    if hierarchy is None or not _is_usable(hierarchy):
        _found_before.cache_clear()
        hierarchy = _found_before()
    return hierarchy


def _is_usable(hierarchy: Hierarchy) -> bool:
    files = (root.parent / "cgroup.procs" for root in hierarchy.roots.values())
    return all(os.access(file, os.W_OK) for file in files)


@functools.cache  # the table of mounts is long, and reading it a third of preparing a container
def _found_before() -> Hierarchy | None:
    v1: dict[str, Path] = {}
    unified: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        point = Path(fields.split()[4])
        if kind == "cgroup2":
            unified = point
        elif kind == "cgroup":
            for controller in options.split()[-1].split(","):
                v1[controller] = point
    if all(name in v1 for name in _V1_CONTROLLERS):
        roots = {name: v1[name] / _PARENT for name in _V1_CONTROLLERS}
        others = tuple(at / _PARENT for name, at in v1.items() if name not in roots)
        hierarchy = Hierarchy(1, roots, unified, others)
        return hierarchy if _is_usable(hierarchy) else None
    if unified is not None and _enable_v2(unified):
        return Hierarchy(2, {"": unified / _PARENT}, None)
    return None


def _enable_v2(mount: Path) -> bool:
    """Whether memory, pids and cpu can be limited below `mount`."""
    try:
        available = (mount / "cgroup.controllers").read_text().split()
        if not {"memory", "pids", "cpu"} <= set(available):
            return False
        (mount / _PARENT).mkdir(exist_ok=True)
        for directory in (mount, mount / _PARENT):
            (directory / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    except OSError:
        return False
    return True


class Cgroup:
    """The groups of one sandbox."""

    def __init__(self, hierarchy: Hierarchy, id: str) -> None:
        self.version = hierarchy.version
        # Text: joining a dozen paths takes as long as making the groups.
        self.directories = {name: f"{root}/{id}" for name, root in hierarchy.roots.items()}
        self.residues = [f"{at}/{id}" for at in hierarchy.others]
        self._oom_kills = 0

    def create(self, limits: Limits) -> None:
        """Make the groups and set the limits; raises `SandboxFailedError`."""
        quota = max(1000, round(limits.cpus * _CPU_PERIOD_US))
        processes = str(limits.processes + RESERVED_PROCESSES)
        # Files live in a memory file system of disk_bytes, which the kernel counts here too.
        memory = str(limits.memory_bytes + limits.disk_bytes)
        try:
            for directory in self.directories.values():
                try:
                    os.mkdir(directory)
                except FileNotFoundError:  # the first sandbox of this machine
                    os.makedirs(directory)
            if self.version == 1:
                self._write("memory", "memory.limit_in_bytes", memory)
                # Without swap accounting the file is missing, and there is nothing to limit.
                with contextlib.suppress(FileNotFoundError):
                    self._write("memory", "memory.memsw.limit_in_bytes", memory)
                self._write("pids", "pids.max", processes)
                self._write("cpu", "cpu.cfs_period_us", str(_CPU_PERIOD_US))
                self._write("cpu", "cpu.cfs_quota_us", str(quota))
            else:
                self._write("", "memory.max", memory)
                with contextlib.suppress(FileNotFoundError):
                    self._write("", "memory.swap.max", "0")
                self._write("", "pids.max", processes)
                self._write("", "cpu.max", f"{quota} {_CPU_PERIOD_US}")
        except OSError as error:
            self.remove()
            raise SandboxFailedError(f"cannot set up control groups: {error}") from error

    def _write(self, controller: str, name: str, value: str) -> None:
        # Not pathlib's write_text: a control file must never be created when it is missing.
        fd = os.open(f"{self.directories[controller]}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def freeze(self) -> None:
        """Stop every process; returns when the kernel has begun to."""
        if self.version == 1:
            self._write("freezer", "freezer.state", "FROZEN")
        else:
            self._write("", "cgroup.freeze", "1")

    def thaw(self) -> None:
        """Let them go on."""
        if self.version == 1:
            self._write("freezer", "freezer.state", "THAWED")
        else:
            self._write("", "cgroup.freeze", "0")

    def new_oom_kills(self) -> int:
        """How often the kernel killed for want of memory since the last call."""
        directory = self.directories["memory" if self.version == 1 else ""]
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        try:  # asked before every command: the plain calls take a fifth of the time
            fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                text = os.read(fd, 4096)
            finally:
                os.close(fd)
        except OSError:
            return 0
        count = next(
            (int(line.split()[1]) for line in text.splitlines() if line.startswith(b"oom_kill ")), 0
        )
        new, self._oom_kills = count - self._oom_kills, count
        return new

    def kill(self) -> None:
        """Kill what is inside; for what a dead shim left behind."""
        with contextlib.suppress(OSError):
            self.thaw()
        for top in self.directories.values():
            for directory, _, _ in os.walk(top):
                with contextlib.suppress(OSError):
                    for pid in Path(directory, "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> bool:
        """Remove the groups; False if something still lives in one."""
        gone = True
        for top in (*self.directories.values(), *self.residues):
            for directory, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError:
                    gone = False
        return gone
