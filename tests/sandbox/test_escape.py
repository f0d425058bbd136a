"""Attempts to get out of a container. Each prints ESCAPED if it got what it tried for.

An attempt that worked must not hurt the machine the tests run on: each aims at what changes nothing
(a setting is set to the value it has, a call gets arguments that can do nothing), and `host.py`
puts back what was changed all the same, and fails the test.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rorqual.errors import SandboxError, SandboxRequestError
from rorqual.sandbox.contract import MIB, Limits
from rorqual.sandbox.sandbox import Sandbox

from .conftest import Make, maker, run
from .host import unchanged_host
from .test_function import ESCAPES_JS, ESCAPES_PYTHON

# Root inside gVisor may see and end its own first process, which ends the sandbox and reaches
# nothing, since the host trusts no agent; and make devices of a kernel that has none.
GVISOR_GRANTS = (
    "agent's environment",
    "agent's descriptors",
    "agent by signal",
    "device node",
    "set-uid program",
    "become another user",
)

_C = "import ctypes, os, sys; c = ctypes.CDLL(None, use_errno=True)\n"
_WIN = "print('ESCAPED') if {} else print('refused')\n"
# For calls that would be harmful with good arguments: bad ones tell a refusal (no such permission,
# no such call) from a kernel that looked at them.
_REFUSED = _C + "{0}\nprint('refused' if ctypes.get_errno() in (1, 13, 38) else 'ESCAPED')\n"
_SET_AGAIN = 'v=$(cat {0}) && test -n "$v" && echo "$v" > {0} && echo ESCAPED'

SHELL = {
    "host secret by absolute path": "cat {secret} && echo ESCAPED",
    "host secret by climbing": "cat ../../../../../../..{secret} && echo ESCAPED",
    "host secret by link": "ln -s {secret} /tmp/l; cat /tmp/l && echo ESCAPED",
    "host secret by /proc/1/root": "cat /proc/1/root{secret} && echo ESCAPED",
    "agent's memory": "head -c1 /proc/1/mem && echo ESCAPED",
    "agent's environment": "cat /proc/1/environ && echo ESCAPED",
    "agent's descriptors": "for f in /proc/1/fd/*; do readlink $f && echo ESCAPED; done",
    "agent's binary": "echo x > /proc/1/exe && echo ESCAPED",
    "agent by signal": "kill -9 1; kill -STOP 1; sleep 0.1; test ! -d /proc/1 && echo ESCAPED",
    "shadow file": "grep -q '^root:[$]' /etc/shadow && echo ESCAPED",
    "write to host's /usr": "echo x > /usr/bin/escaped && echo ESCAPED",
    "mount a tmpfs": "mount -t tmpfs none /mnt 2>/dev/null && echo ESCAPED",
    "remount /usr writable": "mount -o remount,rw /usr && echo ESCAPED",
    "unmount /proc/sys": "umount /proc/sys && echo ESCAPED",
    "new user namespace": "unshare -U true && echo ESCAPED",
    "new mount namespace": "unshare -rm true && echo ESCAPED",
    "agent's namespaces": "nsenter -t 1 -m true && echo ESCAPED",
    "chroot": "chroot / true && echo ESCAPED",
    "device node": "mknod /tmp/d b 254 0 && echo ESCAPED",
    "host disk": "for d in vda sda nvme0n1 mem kmem; do head -c1 /dev/$d && echo ESCAPED; done",
    "kernel memory": "head -c1 /proc/kcore | grep -q . && echo ESCAPED",
    "kernel log": "dmesg && echo ESCAPED",
    "kernel switch": _SET_AGAIN.format("/proc/sys/kernel/sysrq"),
    "core pattern": _SET_AGAIN.format("/proc/sys/kernel/core_pattern"),
    "sysrq trigger": "(: > /proc/sysrq-trigger) && echo ESCAPED",
    "cgroup files": "ls /sys/fs/cgroup/memory && echo ESCAPED",
    "raise own limits": "ulimit -Hn 9999999 && echo ESCAPED",
    "set-uid program": "cp /bin/sh /tmp/s; chmod 4755 /tmp/s; cat /proc/self/status | "
    "grep -q 'NoNewPrivs:.0' && echo ESCAPED",
    "host name": 'hostname "$(hostname)" && echo ESCAPED',
    "clock": 'date -s "@$(date +%s)" && echo ESCAPED',
    "own capabilities": "grep -E 'Cap(Eff|Prm|Bnd):' /proc/self/status | grep -qv 0000000000000000 "
    "&& echo ESCAPED",
    "control socket": "ls /run/*.sock /*.sock {root} && echo ESCAPED",
    "loopback of the host": 'python3 -c "import socket; '
    "s=socket.create_connection(('127.0.0.1',{port}),1); print('ESCAPED')\"",
    "network beyond": "python3 -c \"import socket; s=socket.create_connection(('192.0.2.1',80),1); "
    "print('ESCAPED')\"",
    "interface": "ip link add x type dummy && echo ESCAPED",
}

CALLS = {
    "ptrace the agent": _C + _WIN.format("c.ptrace(16, 1, 0, 0) == 0"),
    "be traced": _C + _WIN.format("c.ptrace(0, 0, 0, 0) == 0"),
    "read another process": _C + _WIN.format("c.process_vm_readv(1, 0, 0, 0, 0, 0) >= 0"),
    "bpf": _REFUSED.format("c.syscall(321, 999, 0, 0)"),
    "io_uring": _C + _WIN.format("c.syscall(425, 8, ctypes.create_string_buffer(256)) >= 0"),
    "keyring": _C + _WIN.format("c.syscall(250, 0, -3, 1) >= 0"),
    "userfaultfd": _C + _WIN.format("c.syscall(323, 1) >= 0"),
    "perf": _C + _WIN.format("c.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0) >= 0"),
    "open by handle": _REFUSED.format("c.syscall(304, -100, ctypes.create_string_buffer(64), 0)"),
    "mount api": _C + _WIN.format("c.syscall(430, b'tmpfs', 0) >= 0"),
    "clone with namespaces": _C + _WIN.format("c.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0"),
    "clone3": _C + _WIN.format("c.syscall(435, ctypes.create_string_buffer(88), 88) > 0"),
    "packet socket": _C + _WIN.format("c.socket(17, 3, 0) >= 0"),
    "vsock": _C + _WIN.format("c.socket(40, 1, 0) >= 0"),
    "alg socket": _C + _WIN.format("c.socket(38, 5, 0) >= 0"),
    "reboot": _REFUSED.format("c.syscall(169, 1, 2, 3, 0)"),
    "load a module": _REFUSED.format("c.syscall(175, b'', 0, b'')"),
    "become another user": _C + _WIN.format("c.setuid(1000) == 0"),
    "keep descriptors": "import os\nfds = [f for f in os.listdir('/proc/self/fd') if int(f) > 2]\n"
    "fds = [f for f in fds if os.path.exists('/proc/self/fd/' + f) and 'fd' not in "
    "os.readlink('/proc/self/fd/' + f)]\n" + _WIN.format("fds"),
    "terminal injection": _C + "import fcntl\n"
    "try: fcntl.ioctl(0, 0x5412, b'x'); print('ESCAPED')\nexcept OSError: print('refused')\n",
}


@pytest.mark.parametrize(
    "isolation",
    [
        "crun",
        *(pytest.param(n, marks=pytest.mark.sandbox) for n in ("bubblewrap", "runc", "gvisor")),
    ],
)
def test_no_attempt_gets_out(root: Path, tmp_path: Path, isolation: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    own = isolation == "gvisor"  # its kernel is not the host's: what it grants is worth nothing

    async def work() -> None:
        import asyncio

        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        make = maker(root, isolation)
        async with await make() as sandbox:
            for name, line in SHELL.items():
                if own and name in GVISOR_GRANTS:
                    continue
                filled = line.replace("{secret}", str(secret)).replace("{root}", str(root))
                result = await sandbox.exec(filled.replace("{port}", str(port)), timeout_s=20.0)
                assert b"ESCAPED" not in result.stdout, name
            for name, script in CALLS.items():
                if own and name in GVISOR_GRANTS:
                    continue
                result = await sandbox.exec(["python3", "-c", script], timeout_s=20.0)
                assert b"ESCAPED" not in result.stdout, name
                assert b"refused" in result.stdout or result.status != "exited", (name, result)
            assert (await sandbox.exec("echo alive")).text == "alive\n"
        server.close()

    with unchanged_host():
        run(work(), timeout_s=300)


def test_the_documentation_counts_what_is_tried() -> None:
    text = " ".join(Path("docs/sandbox.md").read_text().split())
    tried = len(SHELL) + len(CALLS)
    assert tried >= 40
    assert f"{tried} escape attempts against containers" in text
    assert f"{len(GVISOR_GRANTS)} of them are left out on gVisor" in text
    assert f"{len(ESCAPES_JS) + len(ESCAPES_PYTHON)} against functions" in text
    for name in GVISOR_GRANTS:
        assert name in text


@pytest.fixture
def make(root: Path) -> Make:
    return maker(root, None)


BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"


def test_fork_bomb_is_contained_and_killed(make: Make) -> None:
    async def work() -> None:
        async with await make(limits=Limits(processes=60, cpus=0.5)) as sandbox:
            if "processes" not in sandbox.capabilities.enforced:
                pytest.skip("no process limit here")
            result = await sandbox.exec(["python3", "-c", BOMB], timeout_s=1.0)
            assert result.status == "timed-out"
            assert (await sandbox.exec("ls -d /proc/[0-9]* | wc -l")).text.strip() in (
                "3",
                "4",
                "5",
                "6",
            )

    run(work())


def test_memory_bomb_kills_only_itself(make: Make) -> None:
    async def work() -> None:
        async with await make(limits=Limits(memory_bytes=64 * MIB, disk_bytes=32 * MIB)) as sandbox:
            if "memory" not in sandbox.capabilities.enforced:
                pytest.skip("no memory limit here")
            for script in (
                "x = b'x' * (1 << 30)",
                "import mmap; m = mmap.mmap(-1, 1 << 29); m.write(b'x' * (1 << 29))",
            ):
                result = await sandbox.exec(["python3", "-c", script], timeout_s=30.0)
                assert result.status == "out-of-memory"
            filled = await sandbox.exec("head -c 400M /dev/zero > /tmp/big", timeout_s=30.0)
            assert not filled.ok
            assert (await sandbox.exec("echo alive")).ok

    run(work())


def test_downloads_do_not_follow_what_the_sandbox_planted(make: Make, tmp_path: Path) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            await sandbox.exec(
                "mkdir /workspace/d; cd /workspace/d; ln -s /etc/passwd link; ln -s / root; "
                "mkfifo pipe; echo good > good; mkdir loop; ln -s .. loop/up"
            )
            target = tmp_path / "out"
            await sandbox.download("/workspace/d", target)
            assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*")) == [
                "good",
                "loop",
            ]
            # A planted link is read inside the sandbox, where it leads to the sandbox's own file.
            assert b"user:x:1000" in await sandbox.read("/workspace/d/link")
            (tmp_path / "planted").symlink_to("/etc/passwd")
            (tmp_path / "again").mkdir()
            (tmp_path / "again" / "good").symlink_to(tmp_path / "victim")
            with pytest.raises(SandboxRequestError, match="not written through"):
                await sandbox.download("/workspace/d", tmp_path / "again")
            assert not (tmp_path / "victim").exists()

    run(work())


def test_uploads_do_not_follow_links_out_of_their_directory(make: Make, tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "secret").write_text("s")
        (tmp_path / "up").mkdir()
        (tmp_path / "up" / "l").symlink_to(tmp_path / "secret")
        async with await make() as sandbox:
            with pytest.raises(SandboxRequestError, match="leads out"):
                await sandbox.upload(tmp_path / "up", "/workspace/up")

    run(work())


def test_a_frozen_or_lying_agent_is_a_failure_of_the_sandbox(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            client = sandbox.client  # type: ignore[attr-defined]
            client.data_received(b"\xff" * 64)  # a frame larger than any
            with pytest.raises(SandboxError):
                await sandbox.exec("true")

    run(work())


def test_unprivileged_user_gets_a_sandbox_too(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip(
            "runs as root here; the unprivileged path is tested by running the suite as a user"
        )

    async def work() -> None:
        async with await Sandbox.create("container", root=root) as sandbox:
            assert (await sandbox.exec("id -u")).text == "0\n"

    run(work())
