"""Calls of the machine's own CPython, each in a container of its own that was started ahead.

What WebAssembly lacks - every module in the image, threads, native speed - at the price of the
container's boundary instead of the engine's. No call sees anything of another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path

from rorqual.sandbox.contract import ExecRequest, ExecResult
from rorqual.sandbox.pool import WarmPool, Watermarks
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions

FILES = "/data"
"""Where a call finds the files its sandbox was given; as in WebAssembly."""


class ContainerCalls:
    """The warm containers behind one function sandbox.

    Args:
        files: the given files, on this machine.
        output: where spilled output goes, since a call's container ends with it.
    """

    def __init__(self, options: SandboxOptions, files: Path, output: Path) -> None:
        self._options = SandboxOptions(
            substrate="container", image=options.image, limits=options.limits, root=options.root
        )
        self._files = files
        self._output = output
        self._pool = WarmPool(Watermarks(low=1, high=2, at_once=1))
        self._ending: set[asyncio.Task[None]] = set()

    async def warm(self) -> None:
        """Start the containers of the first calls."""
        await self._pool.warm(self._options)

    async def run(self, number: int, request: ExecRequest, argv: list[str]) -> ExecResult:
        """Run `argv` with the stdin, variables and timeout of `request`."""
        sandbox = await self._pool.take(self._options)
        try:
            if any(self._files.iterdir()):
                await sandbox.upload(self._files, FILES)
            options = {"stdin": request.stdin, "env": request.env, "timeout_s": request.timeout_s}
            result = await sandbox.exec(argv, **options)
            return self._keep_output(number, dataclasses.replace(result, command=request.argv))
        finally:
            # The answer does not wait for the cleaning up; `close` does.
            task = asyncio.get_running_loop().create_task(_end(sandbox))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _keep_output(self, number: int, result: ExecResult) -> ExecResult:
        def keep(file: Path | None, name: str) -> Path | None:
            if file is None:
                return None
            self._output.mkdir(exist_ok=True, mode=0o700)
            return Path(shutil.move(file, self._output / f"{number}.{name}"))

        return dataclasses.replace(
            result,
            stdout_file=keep(result.stdout_file, "stdout"),
            stderr_file=keep(result.stderr_file, "stderr"),
        )

    async def close(self) -> None:
        """End every container."""
        await self._pool.close()
        await asyncio.gather(*self._ending)


async def _end(sandbox: Sandbox) -> None:
    await sandbox.kill()
