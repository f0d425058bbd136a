"""Creates sandboxes until it is killed; started and killed at random moments by test_leaks."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rorqual.sandbox.sandbox import Sandbox


async def one(root: Path, number: int) -> None:
    sandbox = await Sandbox.create("container", root=root)
    print("made", flush=True)
    await sandbox.exec(["sh", "-c", "(setsid sleep 300 &) ; echo x > /workspace/x"])
    if number % 3 == 0:
        await sandbox.pause()
    if number % 4 == 0:
        await sandbox.kill()
    else:
        await asyncio.sleep(300)


async def main(root: Path) -> None:
    await asyncio.gather(*(one(root, number) for number in range(8)))
    await asyncio.sleep(300)


asyncio.run(main(Path(sys.argv[1])))
