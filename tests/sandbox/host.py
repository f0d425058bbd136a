"""The settings of this machine that escape attempts aim at: kept, compared, and put back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SETTINGS = tuple(Path("/proc/sys/kernel", name) for name in ("core_pattern", "sysrq"))
PLANTED = Path("/usr/bin/escaped")
"""What the attempt to write to the host's /usr would make."""

CLOCK_TOLERANCE_S = 5.0


@dataclass(frozen=True)
class Host:
    """What was seen of it; `clock_s` is the offset of the clock of the day from the steady one."""

    settings: dict[Path, str]
    hostname: str
    interfaces: frozenset[str]
    planted: bool
    clock_s: float


def look() -> Host:
    """The present settings; one that cannot be read is left out."""
    settings = {}
    for path in SETTINGS:
        with contextlib.suppress(OSError):
            settings[path] = path.read_text()
    return Host(
        settings=settings,
        hostname=socket.gethostname(),
        interfaces=frozenset(name for _, name in socket.if_nameindex()),
        planted=PLANTED.exists(),
        clock_s=time.time() - time.monotonic(),
    )


def put_back(before: Host) -> list[str]:
    """Undo what differs from `before`; returns what did."""
    now = look()
    changed = [str(path) for path, text in before.settings.items() if now.settings[path] != text]
    for path in changed:
        Path(path).write_text(before.settings[Path(path)])
    if now.hostname != before.hostname:
        socket.sethostname(before.hostname)
        changed.append("host name")
    for name in sorted(now.interfaces - before.interfaces):
        # Another program may add one at any time; only what the attempt names is removed.
        if name == "x":
            subprocess.run(["ip", "link", "delete", name], check=False)
            changed.append(f"interface {name}")
    if now.planted and not before.planted:
        PLANTED.unlink()
        changed.append(str(PLANTED))
    if abs(now.clock_s - before.clock_s) > CLOCK_TOLERANCE_S:
        time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + before.clock_s)
        changed.append("clock")
    return changed


@contextlib.contextmanager
def unchanged_host() -> Iterator[None]:
    """Put the machine's settings back whatever happens; fail if any had to be."""
    before = look()
    try:
        yield
    finally:
        changed = put_back(before)
    assert changed == [], f"changed on this machine, and put back: {changed}"
