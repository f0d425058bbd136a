"""The log survives everything: killed at every point, each side effect happens exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import DivergenceError, LostExecError, TrajectoryError
from rorqual.sandbox.container.remains import sweep
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions
from rorqual.sandbox.trajectory.log import TrajectoryLog
from rorqual.sandbox.trajectory.session import Trajectory, open_trajectory, replay

from .conftest import run

CHILD = Path(__file__).with_name("crash_child.py")
NEVER = -1000

Answer = dict[str, Any]


@pytest.fixture(autouse=True)
def _needs_containers(root: Path) -> None:
    async def probe() -> None:
        async with await Sandbox.create("container", root=root):
            pass

    if os.geteuid() != 0:
        pytest.skip("trajectories need root for containers that outlive their creator")
    run(probe())


@pytest.fixture
def log(tmp_path: Path) -> TrajectoryLog:
    return TrajectoryLog(tmp_path / "log.db")


class Zygote:
    """The process whose forks run trajectories and die."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )

    def run(self, root: Path, log: Path, name: str, commands: list[str], cut: int) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"root": str(root), "file": str(log), "name": name, "commands": commands, "cut": cut}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: Answer = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


def effect(number: int, *, pause_s: float = 0.0) -> str:
    return f"sleep {pause_s}; echo {number} >> /workspace/effects; echo did {number}"


def run_until_done(
    zygote: Zygote, root: Path, file: Path, name: str, commands: list[str], cuts: list[int]
) -> Answer:
    """Start it again after each death; the last start has no cut."""
    for cut in [*cuts, NEVER]:
        answer = zygote.run(root, file, name, commands, cut)
        if answer != {"signal": signal.SIGKILL}:
            return answer
    raise AssertionError("it died without having been told to")


def check_exactly_once(answer: Answer, count: int) -> None:
    assert "error" not in answer, answer
    assert answer["effects"] == [str(number) for number in range(count)]
    assert answer["results"] == [f"did {number}\n" for number in range(count)]


# opened, then intent, started, finished of the first command, and the intent of the second
@pytest.mark.parametrize("cut", range(11))
def test_killed_at_each_log_point_each_effect_happens_once(
    zygote: Zygote, root: Path, tmp_path: Path, cut: int
) -> None:
    commands = [effect(0, pause_s=0.05), effect(1)]
    answer = run_until_done(zygote, root, tmp_path / "log.db", "t", commands, [cut])
    check_exactly_once(answer, 2)


def lose_sandbox(root: Path, file: Path, name: str) -> None:
    """Kill the sandbox a trajectory runs in, if it has one."""
    log = TrajectoryLog(file)
    opened = [record for record in log.records(name) if record.kind == "opened"]
    log.close()
    if not opened:
        return
    directory = root / "sandboxes" / opened[-1].data["sandbox"]
    with contextlib.suppress(OSError, ValueError, IndexError):
        os.kill(int((directory / "lock").read_text().split()[0]), signal.SIGTERM)
    while directory.exists():
        time.sleep(0.002)


def crash_random_trajectories(zygote: Zygote, root: Path, file: Path, number: int) -> None:
    """Kill trajectories at random records, now and then with their sandboxes."""
    rng = random.Random(20260424)
    typed = 0
    for index in range(number):
        name = f"t{index}"
        count = rng.randint(1, 4)
        commands = [effect(i, pause_s=rng.choice((0, 0, 0.03))) for i in range(count)]
        if rng.random() < 0.3:
            commands.insert(rng.randint(1, count), "SNAPSHOT")
        answer: Answer = {"signal": signal.SIGKILL}
        for cut in [*(rng.randint(0, 6 * count) for _ in range(rng.randint(1, 3))), NEVER]:
            answer = zygote.run(root, file, name, commands, cut)
            if answer != {"signal": signal.SIGKILL}:
                break
            if rng.random() < 0.1:
                lose_sandbox(root, file, name)
        if "error" in answer:  # its sandbox was lost without a snapshot to go on from
            assert answer["error"] == "LostExecError", answer
            typed += 1
        else:
            check_exactly_once(answer, count)
    assert typed < number / 4  # most can be saved


def test_random_trajectories_killed_at_random_points(
    zygote: Zygote, root: Path, tmp_path: Path
) -> None:
    crash_random_trajectories(zygote, root, tmp_path / "log.db", 12)


@pytest.mark.sandbox
def test_200_random_trajectories_killed_at_random_points(
    zygote: Zygote, root: Path, tmp_path: Path
) -> None:
    crash_random_trajectories(zygote, root, tmp_path / "log.db", 200)


def test_finished_commands_are_answered_without_running(root: Path, log: TrajectoryLog) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        first = await open_trajectory(log, "t", options)
        original = await first.exec("date +%N; echo x >> /workspace/effects", timeout_s=20.0)
        with pytest.raises(TrajectoryError, match="open in another process"):
            await open_trajectory(log, "t", options)
        await first.close(kill=False)
        second = await open_trajectory(log, "t", options)
        again = await second.exec("date +%N; echo x >> /workspace/effects", timeout_s=20.0)
        assert again.replayed
        assert again.stdout == original.stdout
        assert (await second.exec("wc -l < /workspace/effects")).text.strip() == "1"
        await second.close()

    run(work())


def test_a_different_request_is_a_divergence_and_a_branch_is_explicit(
    root: Path, log: TrajectoryLog
) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        first = await open_trajectory(log, "t", options)
        await first.exec("echo 1 > /workspace/f")
        await first.snapshot()
        await first.exec("echo 2 > /workspace/f")
        await first.close()
        second = await open_trajectory(log, "t", options)
        with pytest.raises(DivergenceError, match="as command 0"):
            await second.exec("echo other")
        await second.close()
        log.branch("t", "other", 1)
        third = await open_trajectory(log, "other", options)
        assert (await third.exec("echo 1 > /workspace/f")).replayed
        assert (await third.exec("cat /workspace/f")).text == "1\n"
        await third.close()

    run(work())


async def _lose(trajectory: Trajectory) -> None:
    assert trajectory.sandbox is not None
    await trajectory.sandbox.kill()
    await trajectory.close(kill=False)


def test_a_lost_sandbox_without_snapshot_is_a_typed_error(root: Path, log: TrajectoryLog) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        first = await open_trajectory(log, "t", options)
        await first.exec("echo 1")
        await _lose(first)
        second = await open_trajectory(log, "t", options)
        assert (await second.exec("echo 1")).replayed
        with pytest.raises(LostExecError, match="no snapshot"):
            await second.exec("echo 2")
        await second.close()

    run(work())


def test_a_lost_sandbox_goes_on_from_its_snapshot(root: Path, log: TrajectoryLog) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        first = await open_trajectory(log, "t", options)
        await first.exec("echo kept >> /workspace/f")
        await first.snapshot()
        await first.exec("echo undone >> /workspace/f")
        await _lose(first)
        second = await open_trajectory(log, "t", options)
        assert (await second.exec("echo kept >> /workspace/f")).replayed
        again = await second.exec("echo undone >> /workspace/f")
        assert not again.replayed  # its effect went with the sandbox: on this state it never ran
        assert await second.sandbox.read("/workspace/f") == b"kept\nundone\n"  # type: ignore[union-attr]
        await second.close()

    run(work())


def test_replay_reports_what_differs(root: Path, log: TrajectoryLog) -> None:
    async def work() -> None:
        options = SandboxOptions(root=root)
        trajectory = await open_trajectory(log, "t", options)
        await trajectory.exec("echo same > /workspace/f; cat /workspace/f", stdin="in")
        await trajectory.exec("date +%N")
        await trajectory.exec("date +%N > /workspace/g")
        await trajectory.close()
        report = await replay(log, "t", options)
        assert [step.differences for step in report] == [(), ("stdout",), ("files",)]

    run(work())


def test_output_across_a_crash_is_whole(zygote: Zygote, root: Path, tmp_path: Path) -> None:
    count = "i=0; while [ $i -lt 40000 ]; do echo line $i; i=$((i+1)); done"
    command = f"{count}; echo 0 >> /workspace/effects"
    answer = run_until_done(zygote, root, tmp_path / "log.db", "t", [command], [5])
    assert answer["results"][0].split("\n")[:-1] == [f"line {i}" for i in range(40000)]
    assert answer["effects"] == ["0"]


def test_nothing_is_left_after_all_of_this(root: Path) -> None:
    sweep(root)
    left = [path for path in (root / "sandboxes").iterdir() if not (path / "lock").exists()]
    assert left == []
