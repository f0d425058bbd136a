"""Saved states of guest machines, as `snapshot` leaves them: listed and removed. Saves none itself.

A microvm's is a memory file and the state of its devices, a vm's an overlay with both inside.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.layout import Layout

_BLOCK_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class SavedMachine:
    """One snapshot.

    Attributes:
        num_bytes: on disk; the holes of its files take none.
        created_s: seconds since 1970.
    """

    id: str
    num_bytes: int
    created_s: float


def saved_machines(layout: Layout) -> list[SavedMachine]:
    """Every snapshot of a machine, oldest first."""
    found = []
    for folder in _folders(layout):
        files = [path.stat() for path in folder.iterdir()]
        size = sum(file.st_blocks * _BLOCK_BYTES for file in files)
        found.append(SavedMachine(id=folder.name, num_bytes=size, created_s=folder.stat().st_mtime))
    return sorted(found, key=lambda saved: saved.created_s)


def remove_saved(layout: Layout, id: str) -> bool:
    """Remove a snapshot; whether there was one. Machines forked from it go on."""
    for folder in _folders(layout):
        if folder.name == id:
            shutil.rmtree(folder, ignore_errors=True)
            return True
    return False


def _folders(layout: Layout) -> list[Path]:
    return [
        *(layout.root / "templates").glob("machine-*"),
        *(layout.root / "machines").glob("vm-*"),
    ]
