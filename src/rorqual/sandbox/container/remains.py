"""What is left of containers whose shim is dead: found by its unheld lock, and removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from pathlib import Path

from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.layout import Layout

UNBORN_S = 30.0
"""A directory without a lock is of a start under way until it is this old."""


def remove_remains(directory: Path, life: socket.socket | None = None) -> bool:
    """Remove a sandbox whose shim is dead or dying; True if nothing of it is left."""
    if life is not None:
        life.close()
    for _ in range(500):
        if not directory.exists():
            return True
        with contextlib.suppress(OSError):
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return _remove_dead(directory)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
        time.sleep(0.01)
    return False


def _remove_dead(directory: Path) -> bool:
    hierarchy = find_hierarchy() if os.geteuid() == 0 else None
    gone = True
    if hierarchy is not None:
        cgroup = Cgroup(hierarchy, directory.name)
        for _ in range(200):
            cgroup.kill()
            if gone := cgroup.remove():
                break
            time.sleep(0.005)
    if gone:  # else the directory stays, so that the next sweep finds the groups
        shutil.rmtree(directory, ignore_errors=True)
    return gone and not directory.exists()


def sweep(root: Path | None = None) -> list[str]:
    """Remove what sandboxes left whose shim was killed; returns their ids. Live ones are kept."""
    removed = []
    layout = Layout(root)
    entries = sorted(layout.sandboxes.iterdir()) if layout.sandboxes.exists() else []
    for directory in entries:
        try:
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            # Without a lock its shim has not come so far, or its creator died before starting it.
            with contextlib.suppress(OSError):
                if time.time() - directory.stat().st_mtime > UNBORN_S and _remove_dead(directory):
                    removed.append(directory.name)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
        if _remove_dead(directory):
            removed.append(directory.name)
    return removed
