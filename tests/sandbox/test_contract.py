"""One contract, every container runtime: what holds for one holds for all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rorqual.errors import (
    CommandFailedError,
    SandboxLostError,
    SandboxRefusedError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox.contract import MIB, Limits, Network
from rorqual.sandbox.sandbox import Sandbox
from rorqual.sandbox.sync import SyncSandbox

from .conftest import Make, maker, run

FAST = ("crun", "bubblewrap")
SLOW = ("runc", "gvisor")


@pytest.fixture(params=[*FAST, *(pytest.param(name, marks=pytest.mark.sandbox) for name in SLOW)])
def make(request: pytest.FixtureRequest, root: Path) -> Make:
    return maker(root, request.param)


def test_commands_return_code_output_and_usage(make: Make) -> None:
    async def work() -> None:
        async with await make(env={"GIVEN": "yes"}) as sandbox:
            good = await sandbox.exec(
                "echo out; echo err >&2; echo $GIVEN $MORE", env={"MORE": "m"}
            )
            assert good.ok
            assert good.stdout == b"out\nyes m\n"
            assert good.stderr == b"err\n"
            bad = await sandbox.exec(["sh", "-c", "exit 7"])
            assert (bad.status, bad.returncode) == ("exited", 7)
            with pytest.raises(CommandFailedError, match="exited with 7"):
                bad.check()
            killed = await sandbox.exec("kill -TERM $$")
            assert (killed.status, killed.returncode) == ("signalled", 143)
            missing = await sandbox.exec(["no-such-program"])
            assert (missing.status, missing.returncode) == ("not-started", 127)
            assert b"No such file" in missing.stderr
            merged = await sandbox.exec("echo a; echo b >&2", merge=True)
            assert merged.stdout == b"a\nb\n"
            placed = await sandbox.exec("pwd", cwd="/tmp")
            assert placed.text == "/tmp\n"
            with pytest.raises(SandboxRequestError, match="cwd '/nowhere'"):
                await sandbox.exec("true", cwd="/nowhere")

    run(work())


def test_stdin_of_any_size_arrives_whole(make: Make) -> None:
    async def work() -> None:
        data = bytes(range(256)) * 20_000  # more than every window and pipe in between
        async with await make() as sandbox:
            result = await sandbox.exec(["sha256sum"], stdin=data)
            import hashlib

            assert result.text.split()[0] == hashlib.sha256(data).hexdigest()
            echoed = await sandbox.exec(["cat"], stdin=data)
            assert echoed.stdout_bytes == len(data)
            assert echoed.truncated
            assert echoed.stdout_file is not None
            assert echoed.stdout_file.read_bytes() == data

    run(work())


def test_streaming_and_interactive_input(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            command = await sandbox.start("read a; echo got $a; read b; echo got $b", stdin=None)
            pieces = aiter(command)
            await command.write(b"one\n")
            assert (await anext(pieces)).data == b"got one\n"
            await command.write(b"two\n")
            assert (await anext(pieces)).data == b"got two\n"
            assert (await command.result()).ok

    run(work())


def test_terminal_has_size_and_echo(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            terminal = await sandbox.pty(["sh", "-c", "stty size; test -t 0 && echo tty"], rows=33)
            seen = b"".join([piece.data async for piece in terminal])
            assert seen.split() == [b"33", b"80", b"tty"]
            assert (await terminal.result()).ok

    run(work())


def test_timeout_kills_the_whole_tree(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            # One child left its session, one was orphaned, one ignores signals.
            script = "(setsid sleep 77 &); (trap '' TERM INT; sleep 77) & sleep 77"
            result = await sandbox.exec(script, timeout_s=0.5)
            assert result.status == "timed-out"
            left = await sandbox.exec("grep -l '^sleep$' /proc/[0-9]*/comm")
            assert left.stdout == b""

    run(work())


def test_background_process_outlives_its_command_only(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            started = await sandbox.exec("sleep 60 & echo $!", timeout_s=20.0)
            assert started.ok  # it did not wait for the pipe to close
            pid = started.text.strip()
            assert (await sandbox.exec(["kill", "-0", pid])).ok

    run(work())


def test_output_flood_is_cut_and_said(make: Make) -> None:
    async def work() -> None:
        limits = Limits(output_bytes=1000, spill_bytes=300_000)
        async with await make(limits=limits) as sandbox:
            result = await sandbox.exec("yes", timeout_s=60.0)
            assert result.status == "output-limit"
            assert len(result.stdout) == 1000
            assert result.stdout_file is not None
            assert result.stdout_file.stat().st_size == result.stdout_bytes == 300_000
            assert (await sandbox.exec("echo still here")).text == "still here\n"

    run(work())


def test_files_round_trip(make: Make, tmp_path: Path) -> None:
    async def work() -> None:
        async with await make(files={"/workspace/given": b"g"}) as sandbox:
            assert await sandbox.read("/workspace/given") == b"g"
            await sandbox.write("/workspace/deep/er/x.sh", "echo hi\n", mode=0o755)
            entries = {entry.name: entry for entry in await sandbox.list("/workspace/deep/er")}
            assert entries["x.sh"].size_bytes == 8
            assert entries["x.sh"].mode == 0o755
            for path, error in (("/nowhere", "No such file"), ("/tmp", "Is a directory")):
                with pytest.raises(SandboxRequestError, match=error):
                    await sandbox.read(path)
            with pytest.raises(SandboxRequestError, match="Invalid argument"):
                await sandbox.read("/dev/zero")
            source = tmp_path / "tree"
            (source / "sub").mkdir(parents=True)
            (source / "sub" / "f").write_bytes(b"\x00\xff" * 100_000)
            await sandbox.upload(source, "/workspace/tree")
            await sandbox.download("/workspace/tree", tmp_path / "back")
            assert (tmp_path / "back/sub/f").read_bytes() == b"\x00\xff" * 100_000
            await sandbox.remove("/workspace/tree")
            assert "tree" not in {entry.name for entry in await sandbox.list("/workspace")}

    run(work())


def test_other_users_are_really_others(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            if not sandbox.capabilities.users:
                pytest.skip("this runtime has one user")
            who = await sandbox.exec("id -u; id -g; pwd", user="user")
            assert who.text.split() == ["1000", "1000", "/home/user"]
            assert (await sandbox.exec("id -u", user="4242")).text == "4242\n"
            assert not (await sandbox.exec("echo x > /etc/passwd", user="user")).ok
            with pytest.raises(SandboxRequestError, match="user 'nobody-here'"):
                await sandbox.exec("true", user="nobody-here")

    run(work())


async def _fill(sandbox: Sandbox) -> None:
    """Start commands until the sandbox takes no more."""
    while True:
        await sandbox.start("sleep 30")
        await sandbox.exec("true")


def test_limits_hold(make: Make) -> None:
    async def work() -> None:
        limits = Limits(memory_bytes=160 * MIB, processes=30, disk_bytes=8 * MIB)
        async with await make(limits=limits) as sandbox:
            enforced = sandbox.capabilities.enforced
            try:
                if "disk" in enforced:
                    full = await sandbox.exec("dd if=/dev/zero of=/workspace/big bs=1M count=50")
                    assert b"No space left" in full.stderr
                    await sandbox.remove("/workspace/big")
                hungry = await sandbox.exec(["python3", "-c", "x = bytearray(400 << 20)"])
                assert hungry.status == "out-of-memory" or "memory" not in enforced
                assert (await sandbox.exec("echo alive")).text == "alive\n"
            except SandboxLostError:
                # gVisor's kernel is one process: out of memory ends all of the sandbox, typed.
                assert sandbox.options.isolation == "gvisor"
            if "processes" in enforced:
                many = "for i in $(seq 100); do sleep 5 & done; wait"
                assert b"fork" in (await sandbox.exec(many)).stderr
                with pytest.raises(SandboxRefusedError, match="processes"):
                    await _fill(sandbox)

    run(work())


def test_pause_stops_and_resume_continues(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            if not sandbox.capabilities.pause:
                pytest.skip("no control groups here")
            await sandbox.pause()
            waiting = asyncio.create_task(sandbox.exec("echo later"))
            done, _ = await asyncio.wait({waiting}, timeout=0.3)
            assert not done
            await sandbox.resume()
            assert (await waiting).text == "later\n"

    run(work())


def test_a_paused_sandbox_can_be_killed(make: Make) -> None:
    async def work() -> None:
        sandbox = await make()
        if sandbox.capabilities.pause:
            await sandbox.pause()
        await sandbox.kill()
        await sandbox.kill()
        with pytest.raises(SandboxLostError):
            await sandbox.exec("true")

    run(work())


def test_fork_shares_the_past_and_not_the_future(make: Make) -> None:
    async def work() -> None:
        async with await make() as sandbox:
            if sandbox.capabilities.snapshot is None:
                pytest.skip("no snapshots here")
            await sandbox.exec("echo past > /workspace/f; rm -rf /var/tmp")
            one, two = await sandbox.fork(2)
            async with one, two:
                await one.exec("echo one >> /workspace/f")
                assert await one.read("/workspace/f") == b"past\none\n"
                assert await two.read("/workspace/f") == b"past\n"
                assert await sandbox.read("/workspace/f") == b"past\n"
                assert not (await two.exec("ls /var/tmp")).ok  # a removal is part of the past

    run(work())


def test_exposed_port_is_reachable_from_here(make: Make) -> None:
    async def work() -> None:
        async with await make(files={"/workspace/index.html": b"hello"}) as sandbox:
            await sandbox.exec("cd /workspace; python3 -m http.server 8123 >/dev/null 2>&1 &")
            wait = "for i in $(seq 100); do grep -q 1FBB /proc/net/tcp && break; sleep 0.05; done"
            await sandbox.exec(wait)
            place = await sandbox.expose(8123)
            reader, writer = await asyncio.open_connection(place.host, place.port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
            assert answer.endswith(b"hello")

    run(work())


def test_network_reaches_what_is_allowed_and_nothing_else(make: Make) -> None:
    fetch = (
        "import sys, urllib.request as u\n"
        "try: print(u.urlopen(sys.argv[1], timeout=10).read().decode())\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )

    async def work() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\nserved!")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        allowed = Network(allow=(f"localhost:{port}",), allow_private=True)
        public_only = Network(allow=(f"localhost:{port}",))
        url = f"http://localhost:{port}/"
        async with await make(network=allowed) as sandbox:
            assert (await sandbox.exec(["python3", "-c", fetch, url])).text == "served!\n"
            refused = await sandbox.exec(["python3", "-c", fetch, f"http://127.0.0.1:{port}/"])
            assert "Forbidden" in refused.text
        async with await make(network=public_only) as sandbox:
            assert "Forbidden" in (await sandbox.exec(["python3", "-c", fetch, url])).text
        async with await make() as sandbox:
            assert "served" not in (await sandbox.exec(["python3", "-c", fetch, url])).text
        server.close()

    run(work())


def test_ttl_ends_it(make: Make) -> None:
    async def work() -> None:
        sandbox = await make(ttl_s=0.5)
        with pytest.raises(SandboxLostError):
            await sandbox.exec("sleep 30")
        await sandbox.kill()

    run(work())


def test_ttl_ends_a_paused_one_too(make: Make) -> None:
    async def work() -> None:
        sandbox = await make(ttl_s=1.5)
        if sandbox.capabilities.pause:
            await sandbox.pause()
            await asyncio.sleep(2.0)
            with pytest.raises(SandboxLostError):
                await asyncio.wait_for(sandbox.exec("true"), 10)
        await sandbox.kill()

    run(work())


def test_read_only_root_still_has_places_to_write(make: Make) -> None:
    async def work() -> None:
        async with await make(read_only=True) as sandbox:
            assert not (await sandbox.exec("echo x > /etc/x")).ok
            assert (await sandbox.exec("echo x > /workspace/x && echo x > /tmp/x")).ok

    run(work())


def test_callers_mistakes_are_named(root: Path) -> None:
    async def work() -> None:
        with pytest.raises(SandboxRequestError, match="unknown option 'memory'"):
            await Sandbox.create("container", memory=5)
        with pytest.raises(SandboxRequestError, match="isolation 'magic'"):
            await Sandbox.create("container", root=root, isolation="magic")
        with pytest.raises(SandboxRequestError, match="no image 'nope'"):
            await Sandbox.create("container", root=root, image="nope")
        with pytest.raises(SandboxRequestError, match=r"limits.cpus is 0"):
            Limits(cpus=0)
        with pytest.raises(SandboxRequestError, match="network rule"):
            Network(allow=("http://x",))
        with pytest.raises(UnsupportedError):
            await Sandbox.create("function", image="host")

    run(work())


def test_the_facade_without_await_does_the_same(root: Path) -> None:
    async def probe() -> None:
        async with await Sandbox.create("container", root=root):
            pass

    run(probe())
    with SyncSandbox.create("container", root=root) as sandbox:
        sandbox.write("/workspace/x", "data")
        assert sandbox.exec("cat /workspace/x").text == "data"
        assert b"".join(piece.data for piece in sandbox.start("echo a; echo b")) == b"a\nb\n"
    assert not sandbox.is_alive
