"""Which program starts containers on this machine."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import SandboxRequestError, SubstrateMissingError

RuntimeName = Literal["crun", "runc", "bubblewrap", "gvisor"]

_PROGRAMS: dict[RuntimeName, tuple[str, str]] = {
    "crun": ("crun", "crun"),
    "runc": ("runc", "runc"),
    "bubblewrap": ("bwrap", "bubblewrap"),
    "gvisor": ("runsc", "runsc"),
}
"""Name -> program, Debian package."""


SEALED_FD = 4
"""Where the shim holds `Runtime.sealed`; runtimes close it before the container starts."""


def disk_of(directory: Path) -> str:
    """Where the disk of `directory`'s sandbox is, seen from its shim.

    It is the same place for all, and empty to everyone else: each has mounts of its own, and making
    and removing a directory for them takes longer than the mounts.
    """
    return f"{directory.parent}-disk"


_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Runtime:
    """A container runtime that is installed."""

    name: RuntimeName
    program: str

    @property
    def is_oci(self) -> bool:
        """Whether it takes an OCI bundle."""
        return self.name != "bubblewrap"

    @property
    def can_listen(self) -> bool:
        """Whether the agent can accept connections on an inherited socket; gVisor's cannot."""
        return self.name != "gvisor"

    @property
    def can_checkpoint(self) -> bool:
        """Whether it saves and restores running processes."""
        return self.name == "gvisor"

    def sealed(self) -> int | None:
        """A descriptor of an unchangeable copy of the program, made once per process.

        crun and runc never run from the file itself, which a container could try to overwrite
        through /proc: each run makes a protected copy and starts over from that, a fifth of crun's
        work. A copy that is sealed already needs no other.
        """
        if self.name != "crun":
            return None
        return _sealed_copy(self.program, os.stat(self.program).st_mtime_ns)

    def command(self, directory: Path) -> list[str]:
        """The program with the options that every command about `directory`'s sandbox needs."""
        program = self.program if self.sealed() is None else f"/proc/self/fd/{SEALED_FD}"
        start = [program, "--root", str(directory / "runtime")]
        if self.name == "crun":
            # What it remembers of a container, nobody asks for: it goes with the mount.
            start = [program, "--root", f"{disk_of(directory)}/runtime"]
            start.append("--cgroup-manager=disabled")
        if self.name == "gvisor":
            # Its own network stack with a loopback only; the shim limits its processes.
            start += ["--network=none", "--ignore-cgroups", "--platform=ptrace"]
        return start


@functools.cache
def _sealed_copy(program: str, modified_ns: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with open(program, "rb") as source, open(os.memfd_create("runtime", flags), "wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        # A program that is open for writing cannot be run.
        readable = os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Above every number the shim's other descriptors are put at.
        return fcntl.fcntl(readable, fcntl.F_DUPFD_CLOEXEC, SEALED_FD + 1)
    finally:
        os.close(readable)


def install_command(name: RuntimeName) -> str:
    """How to get it on Debian."""
    return f"apt-get install --no-install-recommends {_PROGRAMS[name][1]}"


def find_runtime(isolation: str | None) -> Runtime:
    """The runtime for `isolation`: None takes the first of crun, runc, bubblewrap that can work.

    Raises:
        SandboxRequestError: no such isolation.
        SubstrateMissingError: it is not installed, or it needs root.
    """
    if isolation is None:
        candidates: tuple[RuntimeName, ...] = ("crun", "runc", "bubblewrap")
        if os.geteuid() != 0:
            candidates = ("bubblewrap",)
    elif isolation in _PROGRAMS:
        candidates = (isolation,)
    else:
        raise SandboxRequestError(f"isolation {isolation!r} is not one of {sorted(_PROGRAMS)}")
    for name in candidates:
        if name != "bubblewrap" and os.geteuid() != 0:
            raise SubstrateMissingError(f"{name} needs root here; isolation='bubblewrap' does not")
        if (program := shutil.which(_PROGRAMS[name][0])) is not None:
            return Runtime(name, program)
    raise SubstrateMissingError(
        f"{candidates[0]} is not installed: {install_command(candidates[0])}"
    )
