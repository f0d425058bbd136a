"""The raw tools beside our sandboxes: the same work by the runtime alone, without us.

All run from one shell in a mount namespace of its own, since some runtimes refuse a machine with an
empty version-2 control group hierarchy beside version 1. It needs root, like the tools.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_UNIFIED = "/sys/fs/cgroup/unified"


class RawTools:
    """Bundles in `directory` and the shell that runs them; use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = 0
        self._shell: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if os.geteuid() == 0 and shutil.which("unshare"):
            self._shell = subprocess.Popen(
                ["unshare", "--mount", "sh"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._say(f"umount {_UNIFIED}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shell is not None:
            self._shell.communicate()

    def _say(self, line: str) -> int:
        """Run a line; its exit code."""
        assert self._shell is not None
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{line}\necho $?\n")
        self._shell.stdin.flush()
        return int(self._shell.stdout.readline())

    def cold(self, isolation: str) -> tuple[str, Callable[[], float]] | None:
        """Name and run of ``true`` in a fresh container, milliseconds; None where it cannot be."""
        program = {"gvisor": "runsc", "bubblewrap": "bwrap"}.get(isolation, isolation)
        if self._shell is None or shutil.which(program) is None:
            return None
        bundle = self._bundle("/usr/bin/true")
        state = shlex.quote(str(self._directory / f"state-{program}"))

        def command() -> str:
            self._numbers += 1
            if program == "bwrap":
                return (
                    f"bwrap --ro-bind {shlex.quote(str(bundle / 'rootfs'))} / --ro-bind /usr /usr "
                    "--dev /dev --proc /proc --unshare-all --die-with-parent true"
                )
            extra = {
                "crun": "--cgroup-manager=disabled",
                "runsc": "--network=none --ignore-cgroups --platform=ptrace",
            }.get(program, "")
            named = f"raw{os.getpid()}x{self._numbers}"
            return f"{program} --root {state} {extra} run --bundle {bundle} {named} >/dev/null"

        def run() -> float:
            line = f"{command()} </dev/null"
            started = time.perf_counter()
            code = self._say(line)
            took = (time.perf_counter() - started) * 1000
            if code != 0:
                raise OSError(f"{line!r} ended with {code}")
            return took

        try:
            run()
        except OSError:
            return None
        return program, run

    def density(self, count: int) -> tuple[float, float] | None:
        """Seconds until `count` containers of crun live, eight at a time, and MB of each."""
        if self._shell is None or shutil.which("crun") is None:
            return None
        bundle = self._bundle("/usr/bin/sleep", "600")
        start = f"crun --root {self._directory}/live --cgroup-manager=disabled"
        each = f"seq {count} | xargs -P 8 -I@ {start}"
        before = available_bytes()
        started = time.perf_counter()
        code = self._say(f"{each} run --detach --bundle {bundle} raw{os.getpid()}d@ >/dev/null")
        took = time.perf_counter() - started
        used = (before - available_bytes()) / count / 1e6
        self._say(f"{each} delete --force raw{os.getpid()}d@")
        return (took, used) if code == 0 else None

    def _bundle(self, *argv: str) -> Path:
        """An OCI bundle over the host's /usr, the plainest the runtimes take."""
        bundle = self._directory / f"bundle-{len(list(self._directory.iterdir()))}"
        rootfs = bundle / "rootfs"
        for name in ("usr", "proc", "dev", "sys", "tmp"):
            (rootfs / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (rootfs / name).symlink_to(f"usr/{name}")
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ]
        spaces = ("pid", "mount", "ipc", "uts", "network")
        config = {
            "ociVersion": "1.0.2",
            "root": {"path": str(rootfs), "readonly": True},
            "process": {
                "terminal": False,
                "user": {"uid": 0, "gid": 0},
                "args": list(argv),
                "env": ["PATH=/usr/bin:/bin"],
                "cwd": "/",
                "noNewPrivileges": True,
            },
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in spaces]},
        }
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle


def available_bytes() -> int:
    """Memory this machine could still give."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) << 10
