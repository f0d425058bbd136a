"""A host's worker and the sandbox that calls it, without Ray in between: everything is pickled."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import (
    RorqualError,
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox.contract import MIB
from rorqual.sandbox.control.admission import Refusal
from rorqual.sandbox.control.layers import manifest_of, send_image
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.remote import RemoteSandbox
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.control.worker import Described, Worker
from rorqual.sandbox.images import ImageStore

from .conftest import run


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """Calls as they travel: what is not plain data does not arrive."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        sent, named = pickle.loads(pickle.dumps((arguments, options)))
        try:
            return pickle.loads(pickle.dumps(await getattr(self.worker, method)(*sent, **named)))
        except RorqualError as error:
            raise pickle.loads(pickle.dumps(error)) from None


class Released(list[str]):
    async def __call__(self) -> None:
        self.append("released")


@asynccontextmanager
async def workers(data: Path, root: Path, **options: Any) -> AsyncIterator[tuple[Worker, Wire]]:
    worker = Worker(Machine(data, shared=root, linger_s=30.0), **options)
    await worker.settle([], frozenset())
    try:
        yield worker, Wire(worker)
    finally:
        await worker.close()


async def remote(wire: Wire, name: str = "one", **wanted: Any) -> RemoteSandbox:
    described = await wire.call("start", name, Wanted(**wanted))
    assert isinstance(described, Described)
    return RemoteSandbox(name, described, wire, linger_s=30.0, release=Released())


def test_output_waits_for_whoever_reads_it_and_input_keeps_its_order(
    root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (_, wire):
            sandbox = await remote(wire)
            flood = "head -c 5000000 /dev/zero; touch /workspace/done"
            unread = await sandbox.start("echo kept")
            assert (await unread.result()).text == "kept\n"
            running = await sandbox.start(flood)
            pieces = aiter(running)
            size = len((await anext(pieces)).data)
            await asyncio.sleep(0.2)
            assert await sandbox.list("/workspace") == []  # it waits: nobody took the rest
            async for piece in pieces:
                size += len(piece.data)
            assert (await running.result()).ok
            assert size == 5_000_000
            assert [entry.name for entry in await sandbox.list("/workspace")] == ["done"]

            cat = await sandbox.start("cat; echo end >&2", stdin=None)
            await cat.write(b"a" * 3_000)
            await cat.write(b"b\n")
            cat.close_stdin()
            got = {"stdout": b"", "stderr": b""}
            async for piece in cat:
                got[piece.channel] += piece.data
            assert got == {"stdout": b"a" * 3_000 + b"b\n", "stderr": b"end\n"}
            assert (await cat.result()).ok

            screen = await sandbox.pty(["sh", "-c", "read x; stty size"], rows=10, columns=20)
            screen.resize(30, 40)
            await screen.write(b"\n")
            shown = b"".join([piece.data async for piece in screen])
            assert b"30 40" in shown
            with pytest.raises(SandboxLostError, match="ended"):
                await wire.call("take", "no such command")

    run(work())


def test_a_caller_that_leaves_ends_its_command(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (_, wire):
            sandbox = await remote(wire)
            task = asyncio.create_task(sandbox.exec("sleep 60; touch /workspace/late"))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(100):
                if not (await sandbox.exec(["pidof", "sleep"])).stdout:
                    break
                await asyncio.sleep(0.05)
            assert (await sandbox.exec(["pidof", "sleep"])).stdout == b""
            running = await sandbox.start("trap 'echo got; exit 4' TERM; echo up; sleep 60 & wait")
            pieces = aiter(running)
            assert (await anext(pieces)).data == b"up\n"
            running.send_signal(15)
            assert (await anext(pieces)).data == b"got\n"
            assert (await running.result()).returncode == 4

    run(work())


def test_errors_keep_their_type_and_what_is_another_hosts_is_refused(
    root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (_, wire):
            sandbox = await remote(wire, substrate="function")
            with pytest.raises(SandboxRequestError) as caught:
                await sandbox.read("/none")
            assert caught.value.errno == errno.ENOENT
            for refused in (sandbox.snapshot(), sandbox.fork(), sandbox.expose(80)):
                with pytest.raises(UnsupportedError):
                    await refused
            with pytest.raises(SandboxFailedError, match="not held"):
                await wire.call("pause", "nobody")
            with pytest.raises(SandboxRequestError, match="no image 'nope'"):
                await wire.call("start", "two", Wanted(template="nope"))
            await sandbox.kill()
            assert not sandbox.is_alive
            assert sandbox._release == ["released"]

    run(work())


def test_a_host_without_memory_refuses(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(tmp_path, root, reserve_bytes=1 << 60) as (_, wire):
            refusal = await wire.call("start", "one", Wanted())
            assert isinstance(refusal, Refusal)
            assert refusal.reason == "host-memory"

    run(work())


def test_another_plane_finds_what_it_knows_and_ends_the_rest(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (worker, wire):
            known, stranger = await remote(wire), await remote(wire, "stranger")
            running = await known.start("sleep 60")
            settled = await worker.settle([known.known], frozenset({"one"}))
            assert set(settled.found) == {"one"}
            assert settled.num_orphans == 1
            with pytest.raises(SandboxLostError):  # its command was the earlier plane's
                await running.result()
            assert (await known.exec("echo on")).text == "on\n"
            with pytest.raises(SandboxFailedError):
                await stranger.exec("true")

            # The worker itself dies: another one finds the container.
            again = Worker(Machine(tmp_path, shared=root, linger_s=30.0))
            settled = await again.settle([known.known], frozenset({"one"}))
            assert set(settled.found) == {"one"}
            assert settled.boot != (await worker.beat(frozenset({"one"}))).boot
            # A beat that does not name it ends it, like one that was started for nobody.
            pulse = await again.beat(frozenset())
            for _ in range(200):
                if not pulse.live:
                    break
                await asyncio.sleep(0.02)
                pulse = await again.beat(frozenset())
            assert list((tmp_path / "sandboxes").iterdir()) == []
            await again.close()

    run(work())


def test_a_start_whose_caller_leaves_is_known_and_ended(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (worker, wire):
            task = asyncio.create_task(wire.call("start", "one", Wanted()))
            while not worker._starting:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while worker._starting:
                await asyncio.sleep(0.01)
            assert (await worker.beat(frozenset({"one"}))).live == {"one"}
            await worker.beat(frozenset())
            for _ in range(200):
                if not list((tmp_path / "sandboxes").iterdir()):
                    break
                await asyncio.sleep(0.02)
            assert list((tmp_path / "sandboxes").iterdir()) == []

    run(work())


def test_silence_ends_everything(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        clock, left = Clock(), asyncio.Event()

        async def leave() -> None:
            left.set()

        async with workers(tmp_path, root, clock=clock, on_silence=leave) as (_, wire):
            await remote(wire)
            clock.now += 29.0
            await asyncio.sleep(1.2)
            assert len(list((tmp_path / "sandboxes").iterdir())) == 1
            await wire.call("beat", frozenset({"one"}))
            clock.now += 30.0
            await asyncio.wait_for(left.wait(), 20)
            assert list((tmp_path / "sandboxes").iterdir()) == []

    run(work())


def test_a_large_file_goes_there_and_back(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(tmp_path, root) as (_, wire):
            sandbox = await remote(wire)
            data = bytes(range(256)) * (8 * MIB // 256)
            await sandbox.write("/workspace/f", data, mode=0o600)
            assert await sandbox.read("/workspace/f") == data
            await sandbox.mkdir("/workspace/d/e")
            await sandbox.remove("/workspace/f")
            assert [entry.name for entry in await sandbox.list("/workspace")] == ["d"]

    run(work())


def test_an_image_is_copied_to_a_host_that_lacks_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("layers are mounted by root")
    mine, theirs = ImageStore(tmp_path / "mine"), ImageStore(tmp_path / "theirs" / "images")

    async def work() -> None:
        source = tmp_path / "source"
        (source / "opt").mkdir(parents=True)
        (source / "opt" / "said").write_text("from an image\n" * 500)
        mine.save("tools", (mine.add_layer(source),), "host")
        manifest = manifest_of(mine, "tools")
        assert manifest is not None
        async with workers(tmp_path / "data", tmp_path / "theirs") as (_, wire):
            with pytest.raises(SandboxRequestError, match="no image 'tools'"):
                await remote(wire, template="tools")
            sent = await send_image(mine, manifest, wire, piece_bytes=1000)
            assert sent == mine.layer_file(manifest.layers[0]).stat().st_size
            assert await send_image(mine, manifest, wire) == 0
            sandbox = await remote(wire, template="tools")
            assert (await sandbox.exec("head -1 /opt/said")).text == "from an image\n"
            await wire.call("layers", "take", "k", "0" * 64, b"x")
            with pytest.raises(SandboxFailedError, match="damaged"):
                await wire.call("layers", "finish", "k", "0" * 64)
            assert [path.stem for path in (theirs.root / "layers").iterdir()] == [*manifest.layers]

    try:
        run(work())
    finally:
        for image in theirs.all():
            theirs.remove(image.name)
