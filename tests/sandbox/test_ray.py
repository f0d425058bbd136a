"""Several hosts: Ray chooses one that has the room, and what dies is told, never run again.

Two nodes of a real Ray cluster, both on this machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rorqual.errors import ConfigError
from rorqual.sandbox.contract import MIB
from rorqual.sandbox.control.admission import Policy
from rorqual.sandbox.control.app import create_app
from rorqual.sandbox.control.hosts import RayOptions
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.store import Store
from rorqual.sandbox.control.trajectories import Trajectories
from rorqual.sandbox.trajectory.log import TrajectoryLog

from .conftest import run
from .test_control import _needs_containers, served
from .test_leaks import eventually, groups, processes

ray = pytest.importorskip("ray", reason="pip install 'rorqual[ray]'")

NODE_MIB = 1280
ONE = {"rorqual": {"limits": {"memory_bytes": 512 * MIB, "disk_bytes": 256 * MIB}}}
"""A sandbox of which a node holds one."""
SMALL = {"rorqual": {"limits": {"memory_bytes": 64 * MIB, "disk_bytes": 64 * MIB}}}


@dataclass
class Nodes:
    """The cluster."""

    cluster: Any
    scratch: str

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def add(self, memory_mib: int) -> Any:
        return self.cluster.add_node(
            num_cpus=2,
            memory=memory_mib * MIB,
            object_store_memory=80 * MIB,
            include_dashboard=False,
        )

    def kill(self, node: Any) -> None:
        if node in self.cluster.worker_nodes:
            self.cluster.remove_node(node, allow_graceful=False)

    @contextlib.contextmanager
    def one_more(self, memory_mib: int) -> Iterator[Any]:
        node = self.add(memory_mib)
        try:
            yield node
        finally:
            self.kill(node)


@pytest.fixture(scope="module")
def nodes(root: Path) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    if os.geteuid() != 0:
        pytest.skip("control groups are root's")
    _needs_containers(root)
    scratch = tempfile.mkdtemp(prefix="ray-")  # sockets in it: their paths must be short
    Path(scratch, "ray").mkdir()  # the cluster's address is written there, else in /tmp/ray
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": scratch,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    head = {
        "num_cpus": 2,
        "memory": NODE_MIB * MIB,
        "object_store_memory": 80 * MIB,
        "include_dashboard": False,
        "temp_dir": scratch,
        # Six seconds instead of fifteen until a silent node counts as dead.
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 6},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Nodes(cluster, scratch)
        made.add(NODE_MIB)
        yield made
    finally:
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@asynccontextmanager
async def planes(
    nodes: Nodes, data: Path, root: Path, *, keep: bool = False, **options: Any
) -> AsyncIterator[tuple[httpx2.AsyncClient, Plane]]:
    """A control plane over the cluster, and a client of it."""
    from rorqual.sandbox.control.ray_hosts import RayHosts

    options = {"wait_s": 3.0, **options}
    linger_s = options.pop("linger_s", 60.0)
    hosts = RayHosts(
        data, RayOptions(address=nodes.address, **options), shared=root, linger_s=linger_s
    )
    hosts.connect()
    store = Store(data / "control.db")
    plane = Plane(store, hosts, Policy(max_memory_bytes=1 << 50), free_bytes=lambda: None)
    machine = Machine(data, shared=root)
    trajectories = Trajectories(plane, machine, TrajectoryLog(data / "trajectories.db"))
    await plane.open()
    transport = httpx2.ASGITransport(create_app(plane, trajectories, keys=None))
    try:
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=60
        ) as client:
            yield client, plane
    finally:
        await trajectories.close(keep=keep)
        await plane.close(keep=keep)


async def make(client: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post("/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def where(plane: Plane, made: dict[str, Any]) -> str:
    host = plane.row(made["sandboxID"], "").host
    assert host is not None
    return host


async def sh(client: httpx2.AsyncClient, made: dict[str, Any], line: str) -> httpx2.Response:
    return await client.post(f"/sandboxes/{made['sandboxID']}/exec", json={"command": line})


def workers(nodes: Nodes) -> list[int]:
    """Processes of the actors of hosts, of this cluster: their logs are in its directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"ray::HostActor" in (entry / "cmdline").read_bytes():
                files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                if any(file.startswith(nodes.scratch) for file in files):
                    found.append(int(entry.name))
    return found


def left(data: Path) -> list[str]:
    """What is still there of sandboxes of this control plane."""
    directories = list((data / "hosts").glob("*"))
    found = [line for directory in directories for line in processes(directory)]
    return found + [str(path) for path in directories]


# -- placement
def test_sandboxes_go_where_there_is_room_and_work_there(
    nodes: Nodes, root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with planes(nodes, tmp_path, root) as (client, plane):
            both = [await make(client, ONE) for _ in range(2)]
            hosts = [where(plane, made) for made in both]
            assert len(set(hosts)) == 2
            for made in both:
                await use(client, made)
            full = await client.post("/sandboxes", json=ONE)
            assert (full.status_code, full.json()["error_code"]) == (429, "no-host")
            assert "768 MiB" in full.json()["message"]
            assert full.headers["Retry-After"] == "5"
            exposed = (await client.get("/metrics")).text
            for host in hosts:
                assert f'rorqual_sandboxes_on_host{{host="{host}"}} 1.0' in exposed
            assert exposed.count("rorqual_sandbox_host_up{") == 2
            assert 'refusals_total{reason="no-host"} 1.0' in exposed
            # What ends gives its room back at once.
            path = f"/sandboxes/{both[0]['sandboxID']}"
            assert (await client.delete(path)).status_code == 204
            assert where(plane, await make(client, ONE)) == hosts[0]

    run(work())
    assert left(tmp_path) == []


async def use(client: httpx2.AsyncClient, made: dict[str, Any]) -> None:
    path = f"/sandboxes/{made['sandboxID']}"
    body = {"command": "cat; echo $X; exit 3", "stdin": "in\n", "env": {"X": "1"}}
    done = (await client.post(f"{path}/exec", json=body)).json()
    assert (done["stdout"], done["returncode"]) == ("in\n1\n", 3)
    big = os.urandom(3 * MIB)
    file = f"{path}/files?path=/workspace/f"
    assert (await client.put(file, content=big)).status_code == 204
    assert (await client.get(file)).content == big
    listed = (await client.get(f"{path}/files/list?path=/workspace")).json()
    assert [(entry["name"], entry["size_bytes"]) for entry in listed] == [("f", len(big))]
    missing = await client.get(f"{path}/files?path=/workspace/none")
    assert (missing.status_code, missing.json()["fault"]) == (404, "caller")
    assert (await client.post(f"{path}/pause")).status_code == 204
    assert (await sh(client, made, "true")).status_code == 409
    assert (await client.post(f"{path}/resume", json={})).status_code == 201
    assert (await streamed(client, made, "head -c 1000000 /dev/zero; echo >&2 e")) == (
        1_000_000,
        b"e\n",
        0,
    )


async def streamed(
    client: httpx2.AsyncClient, made: dict[str, Any], line: str
) -> tuple[int, bytes, int]:
    """Bytes of stdout, stderr, and the exit code of a command of the data plane."""
    message = json.dumps({"process": {"cmd": "/bin/sh", "args": ["-c", line]}}).encode()
    headers = {"E2b-Sandbox-Id": made["sandboxID"], "X-Access-Token": made["envdAccessToken"]}
    body = b"\0" + len(message).to_bytes(4, "big") + message
    answer = (await client.post("/process.Process/Start", content=body, headers=headers)).content
    out, err, code = 0, b"", -1
    while answer:
        size = int.from_bytes(answer[1:5], "big")
        event = json.loads(answer[5 : 5 + size]).get("event", {})
        answer = answer[5 + size :]
        data = event.get("data", {})
        out += len(base64.b64decode(data.get("stdout", "")))
        err += base64.b64decode(data.get("stderr", ""))
        code = event.get("end", {}).get("exitCode", code)
    return out, err, code


def test_only_hosts_with_the_resource_get_sandboxes(
    nodes: Nodes, root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with planes(nodes, tmp_path, root, resource="sandboxes", wait_s=1.0) as (
            client,
            plane,
        ):
            assert plane.hosts.states() == []
            refused = await client.post("/sandboxes", json=SMALL)
            assert (refused.status_code, refused.json()["fault"]) == (429, "operator")

    run(work())


def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    from rorqual.sandbox.control.ray_hosts import RayHosts

    with pytest.raises(ConfigError, match="ray start --head"):
        RayHosts(tmp_path, RayOptions(address="not an address")).connect()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: .*refused"):
        RayHosts(tmp_path, RayOptions(address="127.0.0.1:1")).connect()
    with pytest.raises(ConfigError, match="a share of 2"):
        RayOptions(cpu_share=2.0)


# -- death
def test_a_dead_node_loses_its_own_sandboxes_only(nodes: Nodes, root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with planes(nodes, tmp_path, root, linger_s=5.0) as (client, plane):
            stays = await make(client, ONE)
            with nodes.one_more(4096) as third:
                big = {"rorqual": {"limits": {"memory_bytes": 3000 * MIB}}}
                goes = await make(client, big)
                assert where(plane, goes) == third.node_id
                running = asyncio.create_task(sh(client, goes, "sleep 60"))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(nodes.kill, third)
            answer = await asyncio.wait_for(running, 30)
            assert answer.status_code in (404, 503), answer.text
            assert answer.json()["fault"] == "operator"
            gone = await eventually_async(client, f"/sandboxes/{goes['sandboxID']}", 404)
            assert gone.json()["fault"] == "caller"
            assert (await sh(client, goes, "true")).status_code == 404
            assert (await sh(client, stays, "echo on")).json()["stdout"] == "on\n"
            exposed = (await client.get("/metrics")).text
            assert third.node_id not in exposed
            assert 'ended_total{reason="lost"} 1.0' in exposed

    run(work())
    # Its machine is not dead here: the container waits as long as it was told to, and ends.
    assert eventually(lambda: [x for x in left(tmp_path) if not x.startswith("/")]) == []


async def eventually_async(
    client: httpx2.AsyncClient, path: str, status: int, seconds: float = 30.0
) -> httpx2.Response:
    deadline = time.monotonic() + seconds
    while (answer := await client.get(path)).status_code != status:
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.1)
    return answer


def test_a_command_runs_once_whatever_becomes_of_the_worker(
    nodes: Nodes, root: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with planes(nodes, tmp_path, root) as (client, _):
            made = await make(client, SMALL)
            paused = await make(client, SMALL)
            await client.post(f"/sandboxes/{paused['sandboxID']}/pause")
            lines = [f"echo {n} >> /workspace/f; sleep 0.{n % 7}" for n in range(24)]
            tasks = [asyncio.create_task(sh(client, made, line)) for line in lines]
            await asyncio.sleep(0.25)
            pids = workers(nodes)
            assert len(pids) == 2
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            answers = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            said = {answer.status_code for answer in answers}
            assert 503 in said
            assert said <= {200, 503}, [answer.text for answer in answers]
            again = await held_again(client, made, "exec", {"command": "cat /workspace/f"})
            ran = again.json()["stdout"].split()
            assert len(ran) == len(set(ran)), "a command ran twice"
            finished = {str(n) for n, answer in enumerate(answers) if answer.status_code == 200}
            assert finished <= set(ran)
            await held_again(client, paused, "resume", {})
            assert (await sh(client, paused, "echo on")).json()["stdout"] == "on\n"

    run(work())
    assert left(tmp_path) == []


async def held_again(
    client: httpx2.AsyncClient, made: dict[str, Any], call: str, body: dict[str, Any]
) -> httpx2.Response:
    """The answer once its host's worker, which was killed, holds the sandbox again."""
    deadline = time.monotonic() + 30
    while True:
        answer = await client.post(f"/sandboxes/{made['sandboxID']}/{call}", json=body)
        if answer.is_success:
            return answer
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def test_after_kill_9_of_the_plane_sandboxes_are_found_on_their_hosts(
    nodes: Nodes, root: Path, tmp_path: Path
) -> None:
    options = ("--ray", nodes.address)
    with served(tmp_path, root, *options) as server:
        body = {**ONE, "timeout": 300}
        both = [
            server.call("POST", "/sandboxes", body, **{"Idempotency-Key": key})[1] for key in "ab"
        ]
        small = {"rorqual": {**SMALL["rorqual"], "substrate": "function"}}
        function = server.call("POST", "/sandboxes", small)[1]
        for made in (*both, function):
            file = f"/sandboxes/{made['sandboxID']}/files?path=/workspace/f"
            assert server.call("PUT", file, "kept")[0] == 204
        server.process.kill()
    # One that was being started when it was killed: on a host, and in a row that never knew of it.
    database = Store(tmp_path / "control.db")
    rows = {row.id: row for row in database.active()}
    orphan = database.update(rows[both[1]["sandboxID"]], guest=None, state="creating")
    database.close()
    with served(tmp_path, root, *options) as server:
        assert server.call("GET", f"/sandboxes/{orphan.id}")[0] == 404
        again = server.call("POST", "/sandboxes", body, **{"Idempotency-Key": "a"})[1]
        assert again["sandboxID"] == both[0]["sandboxID"]
        path = f"/sandboxes/{again['sandboxID']}/exec"
        assert server.call("POST", path, {"command": "cat /workspace/f"})[1]["stdout"] == '"kept"'
        file = f"/sandboxes/{function['sandboxID']}/files?path=/workspace/f"
        assert server.call("GET", file) == (200, b'"kept"')
        # The orphan's room is free again.
        assert server.call("POST", "/sandboxes", ONE)[0] == 201
    assert server.process.returncode == 0
    assert left(tmp_path) == []
    assert eventually(lambda: workers(nodes)) == []


def test_without_a_plane_everything_ends_when_its_time_is_up(
    nodes: Nodes, root: Path, tmp_path: Path
) -> None:
    guests: set[str] = set()
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())

    async def work() -> None:
        async with planes(nodes, tmp_path, root, keep=True, linger_s=2.0) as (client, plane):
            guest = plane.row((await make(client, ONE))["sandboxID"], "").guest
            assert guest is not None
            guests.add(guest)

    run(work())
    assert left(tmp_path) != []
    assert groups(guests) != []
    assert eventually(lambda: workers(nodes)) == []
    assert left(tmp_path) == []
    assert groups(guests) == []
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == mounts
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        held = [group["state"] for group in ray.util.placement_group_table().values()]
        assert set(held) <= {"REMOVED"}
    finally:
        ray.shutdown()
