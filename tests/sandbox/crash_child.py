"""Runs trajectories of side effects in processes that kill themselves at a chosen point.

Reads jobs as JSON lines and answers each with one. Every job runs in a forked process of its own,
which spares each death the start of an interpreter; the death itself is a real SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
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


async def work(root: str, file: str, name: str, commands: list[str], cut: int) -> dict[str, Any]:
    log = DyingLog(Path(file))
    log.remaining = cut
    options = SandboxOptions(root=Path(root))
    trajectory = await open_trajectory(log, name, options, linger_s=60.0)
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
    return {"results": results, "effects": effects.text.split()}


def run_forked(job: dict[str, Any]) -> dict[str, Any]:
    """The job's answer, `error` with the name of a typed error, or `signal` if it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                answer = asyncio.run(work(**job))
            except SandboxError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            os.write(writing, json.dumps(answer).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return {"signal": -code}
    found: dict[str, Any] = json.loads(text) if code == 0 else {"failed": code}
    return found


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
