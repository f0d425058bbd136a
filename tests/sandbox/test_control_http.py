"""Whatever is sent to the control plane, the answer is typed; and a real E2B client works on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.sandbox.control.admission import Policy
from rorqual.sandbox.control.app import KeyCheck, create_app
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.store import Store
from rorqual.sandbox.control.trajectories import Trajectories
from rorqual.sandbox.trajectory.log import TrajectoryLog

from .conftest import run

FUNCTION = {"rorqual": {"substrate": "function"}}


@asynccontextmanager
async def application(
    data: Path, root: Path, keys: KeyCheck | None = None
) -> AsyncIterator[tuple[Any, Plane]]:
    machine = Machine(data, shared=root)
    plane = Plane(
        Store(data / "control.db"), machine, Policy(max_sandboxes=8), free_bytes=lambda: None
    )
    trajectories = Trajectories(plane, machine, TrajectoryLog(data / "trajectories.db"))
    await plane.open(reap=False)
    try:
        yield create_app(plane, trajectories, keys=keys), plane
    finally:
        await trajectories.close(keep=False)
        await plane.close()


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
WORDS = """
    templateID timeout autoPause metadata envVars network rorqual mcp secure duration command cwd
    env user stdin merge place path process input signal source destination depth
"""
FIELDS = tuple(WORDS.split())
BODY = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).map(
        lambda v: json.dumps(v).encode()
    ),
    st.dictionaries(
        st.sampled_from(("limits", "substrate", "isolation", "readOnly")), JSON, max_size=3
    ).map(lambda value: json.dumps({"rorqual": value}).encode()),
    st.binary(max_size=40),
)
CALLS = [
    ("POST", "/sandboxes"),
    ("GET", "/v2/sandboxes?limit={junk}&nextToken={junk}&state={junk}&metadata={junk}"),
    ("POST", "/sandboxes/{id}/timeout"),
    ("POST", "/sandboxes/{id}/refreshes"),
    ("POST", "/sandboxes/{id}/resume"),
    ("POST", "/v2/sandboxes/{id}/connect"),
    ("POST", "/sandboxes/{id}/pause"),
    ("POST", "/sandboxes/{id}/exec"),
    ("PUT", "/sandboxes/{id}/files?path=/{junk}"),
    ("GET", "/sandboxes/{id}/files?path=/{junk}"),
    ("GET", "/sandboxes/{id}/files/list?path={junk}"),
    ("DELETE", "/sandboxes/{id}/files?path=/{junk}x"),
    ("GET", "/sandboxes/{junk}"),
    ("POST", "/trajectories/{junk}/replay"),
    ("POST", "/trajectories/!{junk}/exec"),
    ("PATCH", "/sandboxes"),
    ("POST", "/process.Process/Start"),
    ("POST", "/process.Process/List"),
    ("POST", "/process.Process/SendSignal"),
    ("POST", "/process.Process/SendInput"),
    ("POST", "/filesystem.Filesystem/ListDir"),
    ("POST", "/filesystem.Filesystem/Stat"),
    ("POST", "/filesystem.Filesystem/MakeDir"),
    ("POST", "/filesystem.Filesystem/Move"),
    ("POST", "/filesystem.Filesystem/Remove"),
    ("POST", "/files?path={junk}"),
    ("GET", "/files?path=/{junk}"),
]


def test_no_body_path_or_header_makes_a_500_and_every_error_has_a_culprit(
    root: Path, tmp_path: Path
) -> None:
    seen: set[int] = set()
    loop = asyncio.new_event_loop()
    stack = contextlib.AsyncExitStack()

    async def begin() -> tuple[httpx2.AsyncClient, dict[str, Any]]:
        app, _ = await stack.enter_async_context(application(tmp_path, root))
        client = await stack.enter_async_context(client_of(app))
        made = (await client.post("/sandboxes", json={**FUNCTION, "timeout": 80_000})).json()
        return client, made

    client, made = loop.run_until_complete(asyncio.wait_for(begin(), 60))

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        call=st.sampled_from(CALLS),
        body=BODY,
        junk=st.text(alphabet=st.characters(codec="utf-8"), max_size=12),
        framed=st.booleans(),
        header=st.sampled_from(
            [
                {},
                {"Idempotency-Key": "\x7f"},
                {"Connect-Timeout-Ms": "x"},
                {"Authorization": "Basic !"},
            ]
        ),
    )
    def attack(
        call: tuple[str, str], body: bytes, junk: str, framed: bool, header: dict[str, str]
    ) -> None:
        method, path = call
        if framed and path.endswith("Start"):
            body = b"\0" + len(body).to_bytes(4, "big") + body
        quoted = httpx2.QueryParams({"": junk}).__str__().removeprefix("=")
        url = path.replace("{id}", made["sandboxID"]).replace("{junk}", quoted)
        headers = {
            "E2b-Sandbox-Id": made["sandboxID"],
            "X-Access-Token": made["envdAccessToken"],
            "Content-Type": "application/octet-stream",
            **header,
        }
        work = client.request(method, url, content=body, headers=headers)
        answer = loop.run_until_complete(asyncio.wait_for(work, 30))
        seen.add(answer.status_code)
        assert answer.status_code not in (500, 502, 503), (url, body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["fault"] in ("caller", "policy", "operator")
            assert answer.json()["message"]
        elif path.endswith("Start"):
            assert json.loads(answer.content[5:])["error"]["fault"] in ("caller", "policy")

    try:
        attack()
        assert {200, 201, 400, 404, 405} <= seen
    finally:
        loop.run_until_complete(stack.aclose())
        loop.close()


def test_strangers_web_pages_and_other_keys_are_kept_out(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        names = {"secret-a": "a", "secret-b": "b"}
        async with application(tmp_path / "k", root, names.get) as (app, _), client_of(app) as c:
            assert (await c.get("/health")).status_code == 204
            refused = await c.post("/sandboxes", json=FUNCTION)
            assert (refused.status_code, refused.json()["fault"]) == (401, "caller")
            mine, other = {"X-API-Key": "secret-a"}, {"Authorization": "Bearer secret-b"}
            made = (await c.post("/sandboxes", json=FUNCTION, headers=mine)).json()
            path = f"/sandboxes/{made['sandboxID']}"
            assert (await c.get(path, headers=mine)).status_code == 200
            assert (await c.get(path, headers=other)).status_code == 404
            assert (await c.get("/sandboxes", headers=other)).json() == []
            data_plane = {"E2b-Sandbox-Id": made["sandboxID"], "X-Access-Token": "guess"}
            assert (await c.get("/files?path=/x", headers=data_plane)).status_code == 401
        async with application(tmp_path / "n", root) as (app, _), client_of(app) as c:
            page = await c.post("/sandboxes", json=FUNCTION, headers={"Origin": "http://evil.test"})
            assert (page.status_code, page.json()["fault"]) == (403, "policy")
            rebound = await c.get("/sandboxes", headers={"Host": "evil.test"})
            assert rebound.status_code == 403

    run(work())


def test_creation_refuses_by_name_what_it_cannot_honour(root: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with application(tmp_path, root) as (app, _), client_of(app) as c:
            for body, said in [
                ({"mcp": {"x": 1}}, "mcp is not supported"),
                ({"timeOut": 3}, "unknown field 'timeOut'"),
                ({"network": {"denyOut": ["1.2.3.4"]}}, "network.denyOut is not supported"),
                ({"rorqual": {"limits": {"memory_bytes": 1}}}, "limits.memory_bytes is 1"),
                ({"rorqual": {"substrate": "function"}, "timeout": 1e9}, "over the limit"),
            ]:
                answer = await c.post("/sandboxes", json=body)
                assert answer.status_code == 400
                assert said in answer.json()["message"]

    run(work())


@contextmanager
def on_a_socket(data: Path, root: Path, keys: KeyCheck) -> Iterator[str]:
    """The application on a free port, in a thread."""
    started, servers = threading.Event(), []

    async def work() -> None:
        async with application(data, root, keys) as (app, _):
            config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            servers.append((server, server.servers[0].sockets[0].getsockname()[1]))
            started.set()
            await task

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{servers[0][1]}"
    finally:
        servers[0][0].should_exit = True
        thread.join(60)


def test_the_e2b_client_works_against_it(root: Path, tmp_path: Path) -> None:
    e2b = pytest.importorskip("e2b", reason="pip install e2b")
    key = "e2b_" + "0" * 40

    async def probe() -> None:
        from rorqual.sandbox.sandbox import Sandbox

        async with await Sandbox.create("container", root=root):
            pass

    run(probe())
    with on_a_socket(tmp_path, root, {key: "me"}.get) as url:
        where = {"api_key": key, "api_url": url, "sandbox_url": url, "http_version": "1.1"}
        sandbox = e2b.Sandbox.create(
            metadata={"a": "b c"}, envs={"X": "1"}, timeout=60, idempotency_key="one", **where
        )
        again = e2b.Sandbox.create(
            metadata={"a": "b c"}, envs={"X": "1"}, timeout=60, idempotency_key="one", **where
        )
        assert again.sandbox_id == sandbox.sandbox_id
        result = sandbox.commands.run("echo hi $X; echo e >&2")
        assert (result.stdout, result.stderr, result.exit_code) == ("hi 1\n", "e\n", 0)
        with pytest.raises(e2b.CommandExitException) as caught:
            sandbox.commands.run("exit 3")
        assert caught.value.exit_code == 3
        with pytest.raises(e2b.TimeoutException):
            sandbox.commands.run("sleep 20", timeout=0.3)
        sandbox.files.write("/workspace/a", "hello")
        sandbox.files.rename("/workspace/a", "/workspace/d/b")
        assert sandbox.files.read("/workspace/d/b") == "hello"
        assert [entry.name for entry in sandbox.files.list("/workspace")] == ["d"]
        assert not sandbox.files.exists("/workspace/a")
        assert sandbox.files.make_dir("/workspace/new")
        assert not sandbox.files.make_dir("/workspace/new")
        with pytest.raises(e2b.NotFoundException):
            sandbox.files.read("/workspace/none")
        handle = sandbox.commands.run("cat", background=True, stdin=True)
        assert [process.pid for process in sandbox.commands.list()] == [handle.pid]
        sandbox.commands.send_stdin(handle.pid, "typed\n")
        sandbox.commands.close_stdin(handle.pid)
        assert handle.wait().stdout == "typed\n"
        query = e2b.SandboxQuery(metadata={"a": "b c"})
        listed = e2b.Sandbox.list(query=query, **where).next_items()
        assert [item.sandbox_id for item in listed] == [sandbox.sandbox_id]
        assert sandbox.kill()
        assert not sandbox.is_running()
        assert not sandbox.kill()
