"""gVisor: a snapshot holds running processes, their memory, and the files they had written."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rorqual.errors import SandboxRequestError
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import Sandbox

from .conftest import maker, run

pytestmark = pytest.mark.sandbox

# Holds its state in memory only; answers with it on a pipe.
KEEPER = """
import os
held = []
while True:
    with open("/tmp/in") as f: held.append(f.read().strip())
    with open("/tmp/out", "w") as f: f.write(",".join(held))
"""


async def _tell(sandbox: Sandbox, word: str) -> str:
    return (await sandbox.exec(f"echo {word} > /tmp/in; cat /tmp/out", timeout_s=30.0)).text


async def _start_keeper(sandbox: Sandbox) -> None:
    await sandbox.write("/workspace/keeper.py", KEEPER)
    await sandbox.exec("mkfifo /tmp/in /tmp/out; python3 /workspace/keeper.py >/dev/null 2>&1 &")


def test_forks_hold_the_memory_of_the_past_and_not_of_the_future(root: Path) -> None:
    async def work() -> None:
        async with await maker(root, "gvisor")() as sandbox:
            assert sandbox.capabilities.snapshot == "memory"
            await _start_keeper(sandbox)
            assert await _tell(sandbox, "past") == "past"
            await sandbox.write("/workspace/file", "past")
            first, second = await sandbox.fork(2)
            async with first, second:
                assert await _tell(first, "one") == "past,one"
                await first.write("/workspace/file", "one")
                assert await _tell(second, "two") == "past,two"
                assert await second.read("/workspace/file") == b"past"
                assert await _tell(sandbox, "own") == "past,own"
                (third,) = await first.fork()  # of a fork, whose files are a layer more
                async with third:
                    assert await _tell(third, "three") == "past,one,three"
                    assert await third.read("/workspace/file") == b"one"
                    ids = [
                        (await each.exec("cat /etc/machine-id")).text for each in (first, second)
                    ]
                    assert ids[0] != ids[1]

    run(work())


def test_a_command_under_way_goes_on_through_a_snapshot(root: Path) -> None:
    async def work() -> None:
        async with await maker(root, "gvisor")() as sandbox:
            count = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; cat"
            command = await sandbox.start(count, stdin=None)
            pieces = aiter(command)
            seen = (await anext(pieces)).data
            snapshot = await sandbox.snapshot()
            await command.write(b"end\n")
            command.close_stdin()
            async for piece in pieces:
                seen += piece.data
            assert seen.decode().splitlines() == [*(f"line {i}" for i in range(3000)), "end"]
            assert (await command.result()).ok
            async with await maker(root, "gvisor")(snapshot=snapshot) as other:
                # Nobody waits for the command there: it ended with the connection it belonged to.
                left = await other.exec("grep -c . /proc/[0-9]*/comm | wc -l")
                assert int(left.text) < 6

    run(work())


def test_a_memory_snapshot_is_kept_until_it_is_removed(root: Path) -> None:
    async def work() -> None:
        make = maker(root, "gvisor")
        async with await make() as sandbox:
            await _start_keeper(sandbox)
            await _tell(sandbox, "kept")
            snapshot = await sandbox.snapshot()
        async with await make(snapshot=snapshot) as later:  # its origin is gone
            assert await _tell(later, "on") == "kept,on"
        with pytest.raises(SandboxRequestError, match="cannot restore processes"):
            await maker(root, "crun")(snapshot=snapshot)
        async with await maker(root, "crun")(image=snapshot.id) as files_only:
            assert await files_only.read("/workspace/keeper.py") == KEEPER.encode()
        ImageStore(Layout(root).images).remove(snapshot.id)
        with pytest.raises(SandboxRequestError, match="is gone"):
            await make(snapshot=snapshot)

    run(work())


def test_a_sandbox_lives_through_many_snapshots(root: Path) -> None:
    async def work() -> None:
        async with await maker(root, "gvisor")() as sandbox:
            await _start_keeper(sandbox)
            waiting = asyncio.create_task(sandbox.exec("sleep 1; echo done"))
            for number in range(3):
                await sandbox.snapshot()
                assert (await _tell(sandbox, str(number))).split(",")[-1] == str(number)
            assert (await waiting).text == "done\n"

    run(work())
