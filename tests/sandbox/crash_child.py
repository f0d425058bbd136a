"""Runs a trajectory of side effects and kills itself at a chosen point."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rorqual.sandbox.sandbox import SandboxOptions
from rorqual.sandbox.trajectory.log import TrajectoryLog
from rorqual.sandbox.trajectory.session import open_trajectory


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingLog(TrajectoryLog):
    """Dies just before (even) or just after (odd) its n-th record."""

    remaining = -1

    def append(self, *args: Any, **named: Any) -> int:
        cut = self.remaining
        self.remaining -= 2
        if cut == 0:
            die()
        sequence = super().append(*args, **named)
        if cut == 1:
            die()
        return sequence


async def main(root: Path, file: Path, name: str, commands: list[str], cut: int) -> None:
    log = DyingLog(file)
    log.remaining = cut
    trajectory = await open_trajectory(log, name, SandboxOptions(root=root), linger_s=60.0)
    results = []
    for number, command in enumerate(commands):
        if command == "SNAPSHOT":
            await trajectory.snapshot()
            continue
        results.append((await trajectory.exec(command)).text)
        assert trajectory.place == len(results), number
    log.remaining = -1
    effects = await trajectory.exec("cat /workspace/effects")
    await trajectory.close()
    print(json.dumps({"results": results, "effects": effects.text.split()}))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    asyncio.run(
        main(
            Path(arguments[0]),
            Path(arguments[1]),
            arguments[2],
            json.loads(arguments[3]),
            int(arguments[4]),
        )
    )
