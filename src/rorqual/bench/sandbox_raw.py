"""The raw tools beside our sandboxes: the same work by the runtime alone, without us.

Those of containers run from one shell in a mount namespace of its own, since some runtimes refuse a
machine with an empty version-2 control group hierarchy beside version 1. It needs root, like them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rorqual.errors import SandboxFailedError
from rorqual.sandbox.microvm.hardware import Descriptors, arguments
from rorqual.sandbox.microvm.process import Qemu
from rorqual.sandbox.microvm.template import Template

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


def raw_template_fork(template: Template, qemu: Qemu) -> tuple[float, float]:
    """QEMU alone on a template's files: milliseconds until the guest runs, and its private MB.

    No shim, no groups, no other user; nobody greets the agent.
    """
    hardware = template.hardware
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:

        def opened(path: str | Path, flags: int = os.O_RDONLY) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        agent, control, console = (
            [stack.enter_context(end) for end in socket.socketpair()] for _ in range(3)
        )
        fds = Descriptors(
            kernel=opened(hardware.kernel),
            initramfs=opened(hardware.initramfs),
            memory=opened(template.memory, os.O_RDWR),
            layers=tuple(opened(layer) for layer in hardware.layers),
            agent=agent[1].fileno(),
            control=control[1].fileno(),
            console=console[1].fileno(),
        )
        state = opened(template.devices)
        kept = (fds.kernel, fds.initramfs, fds.memory, *fds.layers, state)
        process = subprocess.Popen(
            [qemu.program, *arguments(hardware, fds, shared=False, incoming=True)],
            pass_fds=(*kept, fds.agent, fds.control, fds.console),
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        control[0].settimeout(60.0)
        answers = stack.enter_context(control[0].makefile("rb"))
        answers.readline()
        _qmp(control[0], answers, "qmp_capabilities")
        shared = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
        _qmp(control[0], answers, "migrate-set-capabilities", shared)
        _qmp(control[0], answers, "migrate-incoming", {"uri": f"fd:{state}"})
        while _qmp(control[0], answers, "query-status")["status"] == "inmigrate":
            time.sleep(0.001)
        _qmp(control[0], answers, "cont")
        took = (time.perf_counter() - started) * 1000
        return took, private_mb(process.pid)


def _qmp(control: socket.socket, answers: BinaryIO, name: str, given: object = None) -> Any:
    control.sendall(json.dumps({"execute": name, "arguments": given or {}}).encode() + b"\n")
    for line in answers:  # events come between
        answer = json.loads(line)
        if "error" in answer:
            raise SandboxFailedError(f"QEMU refused {name}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
    raise SandboxFailedError(f"QEMU ended at {name}")


def private_mb(pid: int) -> float:
    """Memory a process has for itself: its pages without a file behind them (Anonymous of smaps).

    Pages of a mapped file are not counted, even if nobody else has them mapped now: they are the
    file's cache.

    Raises:
        SandboxFailedError: the kernel does not tell.
    """
    found = re.search(r"Anonymous: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
    if found is None:
        raise SandboxFailedError(f"the kernel does not tell the memory of process {pid}")
    return int(found[1]) * 1024 / 1e6
