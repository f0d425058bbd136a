"""Warm pools: ready when asked for, filled behind, and nothing left when they close."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rorqual.errors import SandboxFailedError, SandboxLostError, SandboxRequestError
from rorqual.sandbox.contract import Limits
from rorqual.sandbox.pool import WarmPool, Watermarks
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, start_sandbox

from .conftest import run


async def until(condition: object, *, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def live(root: Path) -> int:
    return len(list((root / "sandboxes").iterdir()))


def test_a_taken_sandbox_was_ready_and_another_takes_its_place(root: Path) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        before = live(root) if (root / "sandboxes").exists() else 0
        async with WarmPool(Watermarks(low=2, high=2)) as pool:
            await pool.warm(options)
            assert pool.stats.ready == 2
            taken = await pool.take(options)
            assert pool.stats.warm == 1
            assert (await taken.exec("echo warm")).text == "warm\n"
            await until(lambda: pool.stats.ready == 2)
            other = SandboxOptions(root=root, limits=Limits(processes=33))
            cold = await pool.take(other)  # other limits, other shelf
            assert pool.stats.cold == 1
            assert cold.options.limits.processes == 33
            await cold.kill()
        # Closing ends what waits and what was under way, and not what was taken.
        assert (await taken.exec("echo still")).text == "still\n"
        await taken.kill()
        assert live(root) == before

    run(work())


def test_closing_while_it_fills_leaves_nothing(root: Path) -> None:
    async def work() -> None:
        before = live(root)
        pool = WarmPool(Watermarks(low=1, high=6, at_once=3))
        await (await pool.take(SandboxOptions(root=root))).kill()  # filling has begun
        await pool.close()
        assert live(root) == before

    run(work())


def test_one_that_died_waiting_is_not_handed_out(root: Path) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        made: list[Sandbox] = []

        async def start(options: SandboxOptions) -> Sandbox:
            made.append(await start_sandbox(options))
            return made[-1]

        async with WarmPool(Watermarks(low=0, high=1), start=start) as pool:
            await pool.warm(options)
            await made[0].kill()
            async with await pool.take(options) as taken:
                assert taken is not made[0]
                assert (await taken.exec("true")).ok
            assert pool.stats.dead == 1

    run(work())


def test_a_failing_start_is_told_and_not_repeated_for_ever() -> None:
    async def work() -> None:
        starts = 0

        async def start(options: SandboxOptions) -> Sandbox:
            nonlocal starts
            starts += 1
            raise SandboxFailedError("no")

        async with WarmPool(Watermarks(low=1, high=4, at_once=2), start=start) as pool:
            with pytest.raises(SandboxFailedError, match="no"):
                await pool.warm(SandboxOptions())
            assert starts <= 2
            with pytest.raises(SandboxFailedError, match="no"):
                await pool.take(SandboxOptions())
        with pytest.raises(SandboxLostError, match="closed"):
            await pool.take(SandboxOptions())
        with pytest.raises(SandboxRequestError, match="low <= high"):
            Watermarks(low=3, high=2)

    run(work())
