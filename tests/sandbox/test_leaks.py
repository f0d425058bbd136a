"""Whatever is killed at whatever moment, nothing of a sandbox stays on the machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.sandbox.container.cgroup import find_hierarchy
from rorqual.sandbox.container.remains import sweep
from rorqual.sandbox.sandbox import Sandbox

from .conftest import run

CHILD = Path(__file__).with_name("leak_child.py")


def processes(root: Path) -> list[str]:
    """Shims of this root, and agents, whatever their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                mounts = (entry / "mountinfo").read_text()
            except OSError:
                continue
            if str(root / "sandboxes") in line or str(root / "sandboxes") in mounts:
                found.append(f"{entry.name} {line}")
    return found


def links(pid: str, folder: str) -> set[str]:
    """Namespaces that a process is in ("ns") or holds open ("fd")."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path("/proc", pid, folder).iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.partition(":")[0] in ("mnt", "pid", "net", "ipc", "uts"):
                    found.add(target)
    return found


def kin() -> list[int]:
    """This process, what descends from it, and orphans, which init took over."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_kin(pid: int) -> bool:
        if parents[pid] == 1:
            return True
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [pid for pid in parents if is_kin(pid)]


def held(namespaces: set[str]) -> list[str]:
    """Which of these one of ours is still in or holds open.

    Of other processes none can: a number may name a namespace of theirs by now.
    """
    return [
        f"{pid} {name}"
        for pid in kin()
        for folder in ("ns", "fd")
        for name in links(str(pid), folder) & namespaces
    ]


def groups(ids: set[str]) -> list[Path]:
    hierarchy = find_hierarchy()
    if hierarchy is None:
        return []
    tops = [*hierarchy.roots.values(), *hierarchy.others]
    return [top / id for top in tops for id in ids if (top / id).exists()]


def eventually(empty: Callable[[], object], seconds: float = 20.0) -> object:
    """What `empty` still returns when time is up; the kernel takes a moment to reap."""
    deadline = time.monotonic() + seconds
    while (left := empty()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def kill_at_random(root: Path, creates: int, seed: int) -> None:
    """Kill creators, shims, runtimes and agents at random until `creates` sandboxes were begun."""

    async def probe() -> None:
        async with await Sandbox.create("container", root=root):
            pass

    if os.geteuid() != 0:
        pytest.skip("control groups and mounts are root's")
    run(probe())
    rng = random.Random(seed)
    ids: set[str] = set()
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    own = links("self", "ns")
    namespaces: set[str] = set()
    while len(ids) < creates:
        child = subprocess.Popen(
            [sys.executable, str(CHILD), str(root)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        assert child.stdout is not None
        for _ in range(rng.randint(1, 8)):
            child.stdout.readline()
        ids |= {path.name for path in (root / "sandboxes").iterdir()}
        for line in processes(root):  # sometimes a shim, a runtime or an agent dies first
            namespaces |= links(line.split()[0], "ns") - own
            if rng.random() < 0.15:
                try:
                    os.kill(int(line.split()[0]), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        child.kill()
        child.wait()
        child.stdout.close()
    # A directory without a lock belongs to a creator that died before its shim was there.
    for path in (root / "sandboxes").iterdir():
        with contextlib.suppress(FileNotFoundError):  # its shim is at work
            os.utime(path, (0, 0))
    # Only a sweep can end a container whose shim was killed while it was paused.
    eventually(lambda: sweep(root), 5.0)
    assert eventually(lambda: processes(root)) == []
    eventually(lambda: sweep(root) or list((root / "sandboxes").iterdir()))
    assert list((root / "sandboxes").iterdir()) == []
    assert eventually(lambda: groups(ids)) == []
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == mounts
    assert len(namespaces) > len(ids)
    assert eventually(lambda: held(namespaces)) == []


def test_random_kills_leave_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 12, seed=1)


@pytest.mark.sandbox
def test_a_thousand_creates_with_random_kills_leave_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 1000, seed=2)
