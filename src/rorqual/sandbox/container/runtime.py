"""Which program starts containers on this machine."""

from __future__ import annotations

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

    def command(self, directory: Path) -> list[str]:
        """The program with the options that every command about `directory`'s sandbox needs."""
        start = [self.program, "--root", str(directory / "runtime")]
        if self.name == "crun":
            start.append("--cgroup-manager=disabled")
        if self.name == "gvisor":
            # Its own network stack with a loopback only; the shim limits its processes.
            start += ["--network=none", "--ignore-cgroups", "--platform=ptrace"]
        return start


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
