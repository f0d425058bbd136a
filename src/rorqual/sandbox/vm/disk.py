"""Guest disks: which formats are taken, and the overlay that gets what a sandbox writes.

A disk image is data from somewhere: one that names another file is refused, since QEMU would open
that file on this machine.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import SandboxFailedError, SandboxRequestError, SubstrateMissingError

_QCOW2_MAGIC = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2
SECTOR_BYTES = 512


@dataclass(frozen=True)
class Disk:
    """A guest's disk, which is never written to.

    Attributes:
        size_bytes: as the guest sees it.
    """

    path: Path
    format: Literal["qcow2", "raw"]
    size_bytes: int


def open_disk(image: str | Path | None) -> Disk:
    """Look at a disk image.

    Raises:
        SandboxRequestError: there is none, or it refers to other files.
    """
    if image is None or not str(image).startswith("/"):
        raise SandboxRequestError(
            "vm needs an image, the absolute path of a disk whose guest starts the agent "
            f"(docs/sandbox-vm.md); got {image!r}"
        )
    path = Path(image).resolve()
    if not path.is_file():
        raise SandboxRequestError(f"disk {str(image)!r} is not a file")
    with path.open("rb") as file:
        head = file.read(104)
    if not head.startswith(_QCOW2_MAGIC):
        size = path.stat().st_size
        if size == 0 or size % SECTOR_BYTES:
            raise SandboxRequestError(
                f"{path} is no qcow2 and its {size} bytes are no number of sectors: not a disk"
            )
        return Disk(path, "raw", size)
    try:
        version, backing, _, _, size = struct.unpack_from(">IQIIQ", head, 4)
        features = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
    except struct.error:
        raise SandboxRequestError(f"{path} is a damaged qcow2 file") from None
    if backing or features & _EXTERNAL_DATA:
        raise SandboxRequestError(
            f"{path} refers to another file; make it whole: qemu-img convert -O qcow2 IN OUT"
        )
    return Disk(path, "qcow2", size)


def make_overlay(disk: Disk, target: Path) -> None:
    """An empty qcow2 file of the disk's size; QEMU is told of the disk below when it starts."""
    program = shutil.which("qemu-img")
    if program is None:
        raise SubstrateMissingError(
            "qemu-img is not installed: apt-get install --no-install-recommends qemu-utils"
        )
    command = [program, "create", "-q", "-f", "qcow2", str(target), str(disk.size_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SandboxFailedError(f"qemu-img: {done.stderr.strip()[-300:]}")


def copy_overlay(source: Path, target: Path) -> None:
    """Copy an overlay, holes left out."""
    command = ["cp", "--sparse=always", "--reflink=auto", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SandboxFailedError(f"cannot copy the disk: {done.stderr.strip()[-300:]}")
