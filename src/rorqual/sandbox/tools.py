"""The programs that sandboxes use, which Debian package has each, and installing what is missing.

Only Debian and what derives from it, only as root, and only what is not there yet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxFailedError, SubstrateMissingError

SEARCH_PATH = f"{os.defpath}:/usr/sbin:/sbin:/usr/local/bin"


@dataclass(frozen=True)
class Tool:
    """A program and where it comes from.

    Attributes:
        programs: any one of them will do; an absolute path is a file.
        packages: Debian packages that bring the first.
        purpose: what does not work without it.
    """

    programs: tuple[str, ...]
    packages: tuple[str, ...]
    purpose: str


TOOLS = (
    Tool(("cc", "gcc", "musl-gcc"), ("gcc", "libc6-dev"), "building the agent, once"),
    Tool(("crun",), ("crun",), "containers"),
    Tool(("runc",), ("runc",), "containers where there is no crun"),
    Tool(("bwrap",), ("bubblewrap",), "containers without root"),
    Tool(("runsc",), ("runsc",), 'containers with isolation="gvisor"'),
    Tool(("mkfs.erofs",), ("erofs-utils",), "images and snapshots"),
    Tool(("mmdebstrap",), ("mmdebstrap",), "images from Debian packages"),
    Tool(("nft",), ("nftables",), "a second egress filter inside containers"),
    Tool(("qemu-system-x86_64",), ("qemu-system-x86",), "microvm and vm"),
    Tool(("qemu-img",), ("qemu-utils",), "disks of virtual machines"),
)

KERNEL_TOOLS = (
    Tool(("gcc",), ("gcc", "libc6-dev"), "building a kernel"),
    Tool(("make",), ("make",), "building a kernel"),
    Tool(("flex",), ("flex",), "building a kernel"),
    Tool(("bison",), ("bison",), "building a kernel"),
    Tool(("bc",), ("bc",), "building a kernel"),
    Tool(("xz",), ("xz-utils",), "unpacking a kernel's source"),
    Tool(("/usr/include/libelf.h",), ("libelf-dev",), "building a kernel"),
)
"""For ``rorqual sandbox kernel build``, beside what `TOOLS` has."""

TEST_TOOLS = (
    Tool(("/usr/lib/grub/i386-pc/boot.img",), ("grub-pc-bin",), "the disk that tests of vm boot"),
    Tool(("grub-mkimage",), ("grub-common",), "the disk that tests of vm boot"),
    Tool(("mformat",), ("mtools",), "the disk that tests of vm boot"),
    Tool(("busybox",), ("busybox-static",), "the disk that tests of vm boot"),
)
"""For the heavy tests only."""


def wanted_tools(*, kernel: bool = False, tests: bool = False) -> list[Tool]:
    """What this project can use; with what few need only if asked for.

    Args:
        kernel: to build a guest kernel.
        tests: to run the heavy tests.
    """
    return [*TOOLS, *(KERNEL_TOOLS if kernel else ()), *(TEST_TOOLS if tests else ())]


def missing_tools(
    find: Callable[[str], str | None] | None = None, *, tools: Sequence[Tool] = TOOLS
) -> list[Tool]:
    """Those of `tools` of which no program is found.

    Args:
        find: path of a program, or None.
    """

    def search(program: str) -> str | None:
        if program.startswith("/"):
            return program if Path(program).exists() else None
        return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SEARCH_PATH}")

    found = find or search
    return [tool for tool in tools if not any(found(name) for name in tool.programs)]


def install_command(tools: Sequence[Tool]) -> list[str]:
    """The command that installs the packages of `tools` on Debian."""
    packages = dict.fromkeys(package for tool in tools for package in tool.packages)
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def install(tools: Sequence[Tool]) -> list[Tool]:
    """Install `tools`; returns those that this Debian does not have.

    Raises:
        SubstrateMissingError: this is not Debian, or not root; the message has the command.
        SandboxFailedError: apt-get failed altogether.
    """
    if not tools:
        return []
    shown = " ".join(install_command(tools))
    if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
        raise SubstrateMissingError(f"this is no Debian; there it would be: {shown}")
    if os.geteuid() != 0:
        raise SubstrateMissingError(f"only root installs packages: sudo {shown}")
    if _apt(install_command(tools)) is None or (
        _apt(["apt-get", "update"]) is None and _apt(install_command(tools)) is None
    ):
        return []
    refused = []
    error: str | None = None
    for tool in tools:  # one package a release lacks must not keep the others out
        if (said := _apt(install_command([tool]))) is not None:
            refused.append(tool)
            error = said
    if len(refused) == len(tools):
        raise SandboxFailedError(f"apt-get: {error}")
    return refused


def _apt(command: list[str]) -> str | None:
    """Run it; None if it succeeded, else the end of what it said."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-500:]
