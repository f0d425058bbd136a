"""The initial memory file system of a guest: init, the agent, and the modules its kernel needs.

Not compressed: under emulation unpacking costs more than reading.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from rorqual.sandbox import native
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.kernel import Kernel


def build_initramfs(layout: Layout, kernel: Kernel) -> Path:
    """The file for this kernel and the present agent, made if it is not there."""
    files = {
        "init": native.build("init", layout.binaries),
        "agent": layout.agent(),
        **{f"modules/{module.name}": module for module in kernel.modules},
    }
    archive = pack({name: path.read_bytes() for name, path in files.items()})
    target = layout.binaries / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}"
    if not target.exists():
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_bytes(archive)
        partial.chmod(0o644)
        partial.replace(target)
    return target


def pack(files: dict[str, bytes]) -> bytes:
    """A cpio archive (newc) of executable files; parents are made."""
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    out = bytearray()
    for number, (name, mode, data) in enumerate(entries, start=1):
        out += _entry(number, name, mode, data)
    return bytes(out + _entry(0, "TRAILER!!!", 0, b""))


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
