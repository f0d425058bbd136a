"""The control plane: one creation per token, leases that end, reasons, and no leak by kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import ConfigError, SandboxRequestError
from rorqual.sandbox.contract import MIB, Limits
from rorqual.sandbox.control.admission import Policy, admit
from rorqual.sandbox.control.failures import AnswerError
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.pool import WarmPool, Watermarks
from rorqual.sandbox.control.store import Row, Store
from rorqual.sandbox.control.wants import Wanted

from .conftest import run

FUNCTION = Wanted(substrate="function", lease_s=60.0)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def planes(
    data: Path, root: Path, clock: Clock, *, keep: bool = False, **options: Any
) -> AsyncIterator[Plane]:
    machine = Machine(data, shared=root, linger_s=60.0)
    store = Store(data / "control.db")
    options.setdefault("free_bytes", lambda: None)
    plane = Plane(store, machine, options.pop("policy", None), clock=clock, **options)
    await plane.open(reap=False)
    try:
        yield plane
    finally:
        await plane.close(keep=keep)


def row(id: str, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "id": id,
        "owner": "a",
        "state": "running",
        "template": "base",
        "substrate": "container",
        "access_token": "t",
        "started_s": 0.0,
        "lease_end_s": 30.0,
        "memory_bytes": 100 * MIB,
        "disk_bytes": 0,
        "cpus": 1.0,
    }
    return Row(**{**values, **changes})


# -- admission
@pytest.mark.parametrize(
    ("policy", "owner", "free", "reason", "wait"),
    [
        ({}, "a", None, None, None),
        ({"max_sandboxes": 2}, "b", None, "count", 20),
        ({"max_per_key": 2}, "a", None, "quota", 20),
        ({"max_per_key": 2}, "b", None, None, None),
        ({"max_memory_bytes": 250 * MIB}, "b", None, "memory", 20),
        ({"max_memory_bytes": 300 * MIB}, "b", None, None, None),
        ({"reserve_bytes": 50 * MIB}, "b", 49 * MIB, "host-memory", 5),
    ],
)
def test_admission_names_the_reason_and_when_to_come_back(
    policy: dict[str, int], owner: str, free: int | None, reason: str | None, wait: int | None
) -> None:
    active = [row("1"), row("2", lease_end_s=20.0)]
    refusal = admit(
        Policy(**policy), active, owner=owner, need_bytes=100 * MIB, free_bytes=free, now_s=0.0
    )
    assert (refusal.reason if refusal else None) == reason
    assert (refusal.retry_after_s if refusal else None) == wait


def test_a_pool_refills_from_below_the_low_mark_to_the_high_one() -> None:
    pool = WarmPool(Wanted(), Watermarks(low=1, high=3))
    assert pool.needs_one
    for name in "abc":
        pool.ready.append(name)
    assert not pool.needs_one
    assert [pool.take(), pool.take()] == ["a", "b"]
    assert not pool.needs_one  # one is left, which is the low mark
    pool.take()
    assert pool.needs_one
    with pytest.raises(SandboxRequestError, match="3 to 2"):
        Watermarks(low=3, high=2)


# -- store
def test_a_store_belongs_to_one_control_plane_and_one_schema(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db")
    with pytest.raises(ConfigError, match="in use"):
        Store(tmp_path / "c.db")
    store.add(row("1", env={"A": "ü"}, client_token="x"))
    store.close()
    again = Store(tmp_path / "c.db")
    assert again.by_client_token("a", "x") == row("1", env={"A": "ü"}, client_token="x")
    again._db.execute("PRAGMA user_version = 99")
    again.close()
    with pytest.raises(ConfigError, match="version 99"):
        Store(tmp_path / "c.db")


def test_a_store_of_the_schema_before_is_brought_up_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db")
    store.add(row("1", guest="g"))
    store._db.execute("ALTER TABLE sandboxes DROP COLUMN host")
    store._db.execute("PRAGMA user_version = 1")
    store.close()
    again = Store(tmp_path / "c.db")
    assert again.active() == [row("1", guest="g", host=None)]
    again.update(row("1", guest="g"), host="h")
    assert again.active()[0].host == "h"
    again.close()


# -- life
def test_the_same_client_token_makes_one_sandbox(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with planes(tmp_path, root, Clock()) as plane:
            wanted = Wanted(substrate="function", client_token="t-1")
            rows = await asyncio.gather(*(plane.create("a", wanted) for _ in range(5)))
            assert len({row.id for row in rows}) == 1
            assert (await plane.create("b", wanted)).id != rows[0].id  # a token is its owner's
            other = Wanted(substrate="function", client_token="t-1", lease_s=1.0)
            with pytest.raises(AnswerError, match="different request"):
                await plane.create("a", other)
            await plane.kill(rows[0])
            with pytest.raises(AnswerError, match="has ended: killed"):
                await plane.create("a", wanted)

    run(work())


def test_a_failed_creation_may_be_tried_again_and_leaves_nothing(
    root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with planes(tmp_path, root, Clock()) as plane:
            for _ in range(2):
                with pytest.raises(SandboxRequestError, match="no image 'nope'"):
                    await plane.create("a", Wanted(template="nope", client_token="t"))
            assert plane.rows("a") == []
            assert plane.hosts.guests() == []

    run(work())


def test_leases_end_sandboxes_and_can_be_moved(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        clock = Clock()
        async with planes(tmp_path, root, clock) as plane:
            short, long = [await plane.create("a", FUNCTION) for _ in range(2)]
            plane.set_lease(long, 30.0, only_extend=True)
            assert plane.row(long.id, "a").lease_end_s == clock.now + 60
            plane.set_lease(long, 200.0)
            with pytest.raises(AnswerError, match="over the limit"):
                plane.set_lease(long, 1e9)
            clock.now += 61
            await plane.reap()
            assert [row.id for row in plane.rows("a")] == [long.id]
            with pytest.raises(AnswerError, match="no sandbox"):
                plane.row(short.id, "a")
            with pytest.raises(AnswerError, match="no sandbox"):
                plane.row(long.id, "b")

    run(work())


def test_a_full_plane_refuses_until_one_ends(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        policy = Policy(max_sandboxes=1)
        async with planes(tmp_path, root, Clock(), policy=policy) as plane:
            first = await plane.create("a", FUNCTION)
            with pytest.raises(AnswerError) as caught:
                await plane.create("b", FUNCTION)
            assert caught.value.status == 429
            assert caught.value.error_code == "count"
            assert caught.value.headers["Retry-After"] == "60"
            await plane.kill(first)
            await plane.create("b", FUNCTION)
            assert b'refusals_total{reason="count"} 1.0' in plane.metrics.text()

    run(work())


def test_a_pause_keeps_what_runs_and_survives_a_restart(root: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("control groups are root's")

    async def work() -> None:
        clock = Clock()
        async with planes(tmp_path, root, clock, keep=True) as plane:
            made = await plane.create("a", Wanted(env={"X": "7"}, pause_on_timeout=True))
            sandbox = await plane.use(made)
            await sandbox.exec("echo kept > /workspace/f")
            clock.now += 301
            await plane.reap()
            assert plane.row(made.id, "a").state == "paused"
            with pytest.raises(AnswerError, match="paused"):
                await plane.use(plane.row(made.id, "a"))
        async with planes(tmp_path, root, clock) as plane:
            assert plane.row(made.id, "a").state == "paused"
            resumed = await plane.resume(plane.row(made.id, "a"), 60.0)
            result = await (await plane.use(resumed)).exec("cat /workspace/f; echo $X")
            assert result.text == "kept\n7\n"
        assert plane.hosts.guests() == []

    run(work())


def test_warm_sandboxes_are_handed_out_and_give_way(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        policy, marks = Policy(max_sandboxes=2), Watermarks(low=1, high=2)
        async with planes(tmp_path, root, Clock(), policy=policy, marks=marks) as plane:
            await plane.refill()
            warm = list(plane.pool.ready)
            assert len(warm) == 2
            claimed = await plane.create("a", Wanted(env={"X": "1"}, client_token="t"))
            assert claimed.id == warm[0]
            assert (await (await plane.use(claimed)).exec("echo $X")).text == "1\n"
            assert (await plane.create("a", Wanted(env={"X": "1"}, client_token="t"))).id == warm[0]
            small = Wanted(limits=Limits(memory_bytes=64 * MIB))
            other = await plane.create("a", small)  # another shape: the warm one makes room
            assert other.id not in warm
            assert plane.pool.ready == []

    run(work())


# -- kill -9
@dataclass
class Served:
    process: subprocess.Popen[str]
    port: int

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read()
            is_json = "json" in answer.headers.get("content-type", "")
            return answer.status, json.loads(data) if is_json else data


@contextmanager
def served(data: Path, root: Path, *options: str) -> Iterator[Served]:
    command = ["-m", "rorqual.cli.main", "sandbox", "--root", str(root), "serve", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, *command, "--data", str(data), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "http://" in line, line
        yield Served(process, int(line.strip().rpartition(":")[2]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def test_after_kill_9_sandboxes_are_adopted_and_strangers_ended(root: Path, tmp_path: Path) -> None:
    _needs_containers(root)
    with served(tmp_path, root) as server:
        _, made = server.call("POST", "/sandboxes", {"timeout": 300}, **{"Idempotency-Key": "k"})
        _, function = server.call("POST", "/sandboxes", {"rorqual": {"substrate": "function"}})
        exec_path = f"/sandboxes/{made['sandboxID']}/exec"
        assert server.call("POST", exec_path, {"command": "echo 1 > /workspace/f"})[0] == 200
        placed = "/trajectories/t/exec"
        status, first = server.call("POST", placed, {"command": "echo 1 >> /workspace/f; date +%N"})
        assert status == 200
        server.process.kill()
    # A creation that was killed before its row knew of it is a container no row speaks of.
    database = Store(tmp_path / "control.db")
    rows = {row.id: row for row in database.active()}
    orphan = database.update(rows[made["sandboxID"]], guest=None, state="creating")
    database.close()
    with served(tmp_path, root) as server:
        assert server.call("GET", f"/sandboxes/{orphan.id}")[0] == 404
        assert list((tmp_path / "sandboxes").iterdir()) == []
        assert server.call("GET", f"/sandboxes/{function['sandboxID']}")[0] == 404
        _, made = server.call("POST", "/sandboxes", {"timeout": 300}, **{"Idempotency-Key": "k"})
        exec_path = f"/sandboxes/{made['sandboxID']}/exec"
        server.call("POST", exec_path, {"command": "echo 2 > /workspace/f"})
        server.process.kill()
    with served(tmp_path, root) as server:
        status, again = server.call(
            "POST", "/sandboxes", {"timeout": 300}, **{"Idempotency-Key": "k"}
        )
        assert (status, again["sandboxID"]) == (201, made["sandboxID"])
        assert server.call("POST", exec_path, {"command": "cat /workspace/f"})[1]["stdout"] == "2\n"
        # The trajectory's first command is answered from the log, its second runs in its sandbox.
        repeat = {"command": "echo 1 >> /workspace/f; date +%N", "place": 0}
        replayed = server.call("POST", placed, repeat)[1]
        assert (replayed["stdout"], replayed["replayed"]) == (first["stdout"], True)
        second = {"command": "wc -l < /workspace/f", "place": 1}
        assert server.call("POST", placed, second)[1]["stdout"].strip() == "1"
        assert server.call("POST", placed, {"command": "date", "place": 0})[0] == 409
        assert server.call("DELETE", "/trajectories/t")[0] == 204
        log = server.call("GET", "/trajectories/t")[1]
        kinds = [record["kind"] for record in log if record["kind"] != "started"]
        assert kinds == ["opened", "intent", "finished", "intent", "finished"]
        assert server.call("POST", "/trajectories/t/replay")[0] == 202
        deadline = time.monotonic() + 30
        while (report := server.call("GET", "/trajectories/t/replay")[1])["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (report["commands"], report["steps"][1]["differences"]) == (2, [])
    assert server.process.returncode == 0
    assert list((tmp_path / "sandboxes").iterdir()) == []
    assert list((tmp_path / "trajectories" / "sandboxes").iterdir()) == []


def _needs_containers(root: Path) -> None:
    from rorqual.sandbox.sandbox import Sandbox

    async def probe() -> None:
        async with await Sandbox.create("container", root=root):
            pass

    run(probe())


def test_other_addresses_need_a_key(tmp_path: Path, root: Path) -> None:
    command = ["-m", "rorqual.cli.main", "sandbox", "serve", "--host", "0.0.0.0", "--port", "0"]
    keys = ["--key-file", str(tmp_path / "keys"), "--data", str(tmp_path / "d")]
    done = subprocess.run(
        [sys.executable, *command, *keys],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode != 0
    assert "refusing to listen on 0.0.0.0" in done.stderr
