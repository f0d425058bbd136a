"""The contract, the escape attempts and forks over guest machines; each boots at least once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from rorqual.bench.sandbox_machine import template_forks
from rorqual.bench.sandbox_rows import Bench
from rorqual.errors import SandboxRequestError, UnsupportedError
from rorqual.sandbox.contract import MIB, Limits, Network
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.initramfs import build_initramfs
from rorqual.sandbox.microvm.kernel import find_kernel
from rorqual.sandbox.microvm.kvm import choose_accelerator, starts_with_kvm
from rorqual.sandbox.microvm.process import find_qemu
from rorqual.sandbox.microvm.sandbox import MicroVMSandbox
from rorqual.sandbox.sandbox import Sandbox
from rorqual.sandbox.saved import remove_saved, saved_machines

from .conftest import Make, run
from .test_contract import (  # noqa: F401  (run again, with this module's `make`)
    test_a_paused_sandbox_can_be_killed,
    test_background_process_outlives_its_command_only,
    test_commands_return_code_output_and_usage,
    test_exposed_port_is_reachable_from_here,
    test_files_round_trip,
    test_fork_shares_the_past_and_not_the_future,
    test_limits_hold,
    test_network_reaches_what_is_allowed_and_nothing_else,
    test_other_users_are_really_others,
    test_output_flood_is_cut_and_said,
    test_pause_stops_and_resume_continues,
    test_read_only_root_still_has_places_to_write,
    test_stdin_of_any_size_arrives_whole,
    test_streaming_and_interactive_input,
    test_terminal_has_size_and_echo,
    test_timeout_kills_the_whole_tree,
    test_ttl_ends_it,
)
from .test_escape import (  # noqa: F401
    BOMB,
    CALLS,
    SHELL,
    test_a_frozen_or_lying_agent_is_a_failure_of_the_sandbox,
    test_downloads_do_not_follow_what_the_sandbox_planted,
    test_memory_bomb_kills_only_itself,
    test_uploads_do_not_follow_links_out_of_their_directory,
)

pytestmark = pytest.mark.sandbox

# A guest's /usr is its own copy.
GRANTED = ("write to host's /usr",)


# Opens a connection out through the proxy and takes one in, answers on both in capitals, and writes
# down when one ends: a stale one would stay open without ever saying another word.
PEER = rb"""
import socket, sys, threading
def serve(sock, name):
    try:
        while data := sock.recv(100):
            sock.sendall(data.upper())
    except OSError:
        pass
    open('/workspace/' + name, 'w').write('ended')
server = socket.create_server(('127.0.0.1', 7777))
out = socket.create_connection(('127.0.0.1', 3128))
out.sendall(b'CONNECT localhost:%s HTTP/1.1\r\n\r\n' % sys.argv[1].encode())
assert b' 200 ' in out.recv(100)
out.sendall(b'.')
threading.Thread(target=serve, args=(out, 'out')).start()
serve(server.accept()[0], 'in')
"""
BOTH_ENDED = (
    "for i in $(seq 400); do [ -s out ] && [ -s in ] && exit; sleep 0.05; done; ls out in; exit 1"
)


@pytest.fixture
def make(root: Path) -> Make:
    async def make(**options: Any) -> Sandbox:
        return await Sandbox.create("microvm", root=root, **options)

    return make


def test_no_attempt_gets_out(make: Make, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def work() -> None:
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with await make() as sandbox:
            for name, line in SHELL.items():
                filled = line.replace("{secret}", str(secret)).replace("{root}", str(root))
                result = await sandbox.exec(filled.replace("{port}", str(port)), timeout_s=60.0)
                assert name in GRANTED or b"ESCAPED" not in result.stdout, name
            assert not Path("/usr/bin/escaped").exists()
            for name, script in CALLS.items():
                result = await sandbox.exec(["python3", "-c", script], timeout_s=60.0)
                assert b"ESCAPED" not in result.stdout, name
                assert b"refused" in result.stdout or result.status != "exited", (name, result)
            for device in ("agent", "vda", "ttyS0", "hvc0", "vport0p1", "mem", "port"):
                found = await sandbox.exec(f"head -c1 /dev/{device} && echo ESCAPED")
                assert b"ESCAPED" not in found.stdout, device
            assert (await sandbox.exec("echo alive")).text == "alive\n"
        server.close()

    run(work(), timeout_s=600)


def test_fork_bomb_is_contained_and_killed(make: Make) -> None:
    async def work() -> None:
        async with await make(limits=Limits(processes=60, cpus=0.5)) as sandbox:
            result = await sandbox.exec(["python3", "-c", BOMB], timeout_s=1.0)
            assert result.status == "timed-out"
            left = await sandbox.exec("grep -l '^python3$' /proc/[0-9]*/comm")
            assert left.stdout == b""

    run(work())


def test_forks_have_an_identity_of_their_own_and_run_on(make: Make, root: Path) -> None:
    async def work() -> None:
        tell = "cat /etc/machine-id; hostname; head -c16 /dev/urandom | od -An -tx1"
        count = "(while true; do echo x >> /workspace/n; sleep 0.1; done) >/dev/null 2>&1 & echo $!"
        async with await make() as sandbox:
            pid = (await sandbox.exec(count)).text.strip()
            before = saved_machines(Layout(root))
            forks = await sandbox.fork(2)
            async with forks[0], forks[1]:
                machines = [sandbox, *forks]
                told = [(await machine.exec(tell)).text.split("\n") for machine in machines]
                for field in range(3):
                    assert len({answer[field] for answer in told}) == 3
                clocks = [float((await m.exec("date +%s.%N")).text) for m in machines]
                assert max(clocks) - min(clocks) < 60  # all were set; a boot's clock is not zero
                for machine in machines:  # the background process is part of each
                    assert (await machine.exec(["kill", "-0", pid])).ok
                await forks[0].exec(["kill", pid])
                assert (await forks[1].exec(["kill", "-0", pid])).ok
            assert saved_machines(Layout(root)) == before  # what only its forks need is gone
            snapshot = await sandbox.snapshot()
            with pytest.raises(SandboxRequestError, match="cannot change"):
                await make(snapshot=snapshot, limits=Limits(memory_bytes=99 * MIB))
            assert saved_machines(Layout(root))[-1].id == snapshot.id
            assert remove_saved(Layout(root), snapshot.id)
            assert saved_machines(Layout(root)) == before
            with pytest.raises(SandboxRequestError, match="is gone"):
                await make(snapshot=snapshot)

    run(work(), timeout_s=300)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answers(connection: Connection) -> bool:
    """Whether the other end still does."""
    connection[1].write(b"x")
    return await asyncio.wait_for(connection[0].read(1), 30) == b"X"


def test_connections_to_the_outside_end_in_a_fork_and_after_a_pause(make: Make) -> None:
    async def work() -> None:
        arrived: asyncio.Queue[Connection] = asyncio.Queue()
        server = await asyncio.start_server(
            lambda reader, writer: arrived.put_nowait((reader, writer)), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        network = Network(allow=(f"localhost:{port}",), allow_private=True)

        async def connect(sandbox: Sandbox) -> tuple[Connection, Connection]:
            """One that the sandbox opened, and one into it."""
            await sandbox.exec(f"python3 peer.py {port} >/dev/null 2>&1 &", cwd="/workspace")
            outward = await asyncio.wait_for(arrived.get(), 30)
            assert await asyncio.wait_for(outward[0].read(1), 30) == b"."
            place = await sandbox.expose(7777)
            return outward, await asyncio.open_connection(place.host, place.port)

        async with await make(network=network, files={"/workspace/peer.py": PEER}) as sandbox:
            held = await connect(sandbox)
            assert await answers(held[0])
            assert await answers(held[1])
            (fork,) = await sandbox.fork()
            async with fork:
                assert (await fork.exec(BOTH_ENDED, cwd="/workspace")).ok
                fresh = await connect(fork)  # the fork is not cut off, only what was before is
                assert await answers(fresh[0])
                assert await answers(fresh[1])
            assert await answers(held[0])
            assert await answers(held[1])
            assert not (await sandbox.exec("ls out in", cwd="/workspace")).ok
            await sandbox.pause()
            for _, writer in held:  # nobody inside can notice while it stands still
                writer.close()
            await sandbox.resume()
            assert (await sandbox.exec(BOTH_ENDED, cwd="/workspace")).ok
        server.close()

    run(work(), timeout_s=300)


def test_a_snapshot_taken_in_full_flow_is_whole_on_both_sides(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            data = os.urandom(3_000_000)
            running = asyncio.create_task(sandbox.exec("cat; sleep 0.5", stdin=data))
            await asyncio.sleep(0.05)
            snapshot = await sandbox.snapshot()
            result = await running
            assert result.stdout_bytes == len(data)
            assert result.stdout_file is not None
            assert result.stdout_file.read_bytes() == data
            async with await make(snapshot=snapshot) as copy:
                assert (await copy.exec("echo there")).text == "there\n"

    run(work(), timeout_s=300)


def test_no_process_or_file_is_left_of_the_killed(make: Make, root: Path) -> None:
    async def work() -> None:
        sandboxes = [await make() for _ in range(3)]
        pids = []
        for sandbox in sandboxes:
            assert isinstance(sandbox, MicroVMSandbox)
            pids.append(int((sandbox.directory / "lock").read_text()))
        await sandboxes[0].kill()
        assert isinstance(sandboxes[1], MicroVMSandbox)
        await sandboxes[1].machine.qmp.execute("stop")
        await sandboxes[1].kill()
        await sandboxes[2].pause()
        await sandboxes[2].kill()
        for sandbox, pid in zip(sandboxes, pids, strict=True):
            assert not (root / "sandboxes" / sandbox.id).exists()
            async with asyncio.timeout(10):  # the shim's last act is to leave
                while Path(f"/proc/{pid}").exists():
                    await asyncio.sleep(0.01)
            for group in Path("/sys/fs/cgroup").glob(f"*/rorqual/{sandbox.id}"):
                pytest.fail(f"{group} is left")

    run(work(), timeout_s=300)


def test_kvm_is_believed_only_after_a_guest_ran_on_it(root: Path) -> None:
    async def work() -> None:
        qemu, kernel, layout = find_qemu(), find_kernel(), Layout(root)
        initramfs = build_initramfs(layout, kernel)
        works = await starts_with_kvm(layout, qemu, kernel, initramfs)
        chosen = await choose_accelerator(layout, qemu, kernel, initramfs)
        assert chosen == ("kvm" if works else "tcg")
        assert works or not list((root / "sandboxes").iterdir())

    run(work())


def test_what_a_machine_cannot_do_is_named(make: Make) -> None:
    async def work() -> None:
        with pytest.raises(UnsupportedError, match="outlive"):
            await make(linger_s=5)
        with pytest.raises(SandboxRequestError, match="isolation 'gvisor'"):
            await make(isolation="gvisor")

    run(work())


def test_template_forks_are_measured_beside_qemu_alone(root: Path) -> None:
    rows = run(template_forks(Bench(repetitions=1, root=root)), timeout_s=300)
    assert [(row.measure, row.target, row.raw) for row in rows] == [
        ("running", 80.0, "qemu -incoming"),
        ("create returns", 0.0, ""),
        ("first exec", 350.0, ""),
        ("private memory, running", 20.0, "qemu -incoming"),
        ("private memory, after first exec", 20.0, ""),
    ]
    assert all(row.median > 0 for row in rows)
    assert rows[1].median < rows[2].median
    assert rows[3].median < rows[4].median
