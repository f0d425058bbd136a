"""Direct routes: what is stated is reached without a proxy, everything else is refused."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rorqual.errors import SandboxRefusedError, SandboxRequestError, UnsupportedError
from rorqual.sandbox.container.egress import Route, ruleset
from rorqual.sandbox.contract import Network

from .conftest import maker, run

CONNECT = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), 5) as s:
            s.sendall(b"ping")
            print(place, s.recv(100).decode())
    except OSError as error:
        print(place, "refused")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
        s.sendto(b"x", ("192.0.2.1", 53)); print("datagram left")
    except OSError:
        print("datagram refused")
"""


def test_rules_name_each_place_and_drop_the_rest() -> None:
    text = ruleset([Route("db", "192.0.2.7", 5432, 3200), Route("git", "192.0.2.8", 22, 3201)])
    assert "ip daddr 192.0.2.7 tcp dport 5432 redirect to :3200" in text
    assert "ip daddr 192.0.2.8 tcp dport 22 redirect to :3201" in text
    assert "hook output priority 0; policy drop;" in text


@pytest.mark.parametrize(
    "isolation",
    ["crun", "bubblewrap", pytest.param("runc", marks=pytest.mark.sandbox)],
)
def test_stated_places_are_reached_and_no_others(root: Path, isolation: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("direct routes are root's")

    async def work() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readexactly(4) == b"ping"
            writer.write(b"pong")
            writer.close()

        # Another address of this machine's loopback: inside it is not the sandbox's own loopback
        # that answers, since the rule sends it to the relay.
        first = await asyncio.start_server(serve, "127.8.9.10", 0)
        other = await asyncio.start_server(serve, "127.8.9.10", 0)
        port, closed = (server.sockets[0].getsockname()[1] for server in (first, other))
        allowed = Network(direct=(f"127.8.9.10:{port}",), allow_private=True)
        places = [f"127.8.9.10:{port}", f"127.8.9.10:{closed}", f"127.0.0.1:{port}", "192.0.2.1:80"]
        make = maker(root, isolation)
        async with await make(network=allowed) as sandbox:
            result = await sandbox.exec(["python3", "-c", CONNECT, *places])
            assert result.text.splitlines() == [
                f"{places[0]} pong",
                *(f"{place} refused" for place in places[1:]),
                "datagram refused",
            ]
            undo = await sandbox.exec("/usr/sbin/nft flush ruleset && echo undone")
            assert "undone" not in undo.text
            assert (await sandbox.exec(["python3", "-c", CONNECT, places[1]])).text.startswith(
                f"{places[1]} refused"
            )
        with pytest.raises(SandboxRefusedError, match="private address"):
            await make(network=Network(direct=(f"127.8.9.10:{port}",)))
        with pytest.raises(SandboxRequestError, match="is not NAME:PORT"):
            Network(direct=("example.org",))
        first.close()
        other.close()

    run(work())


def test_a_name_is_resolved_here_and_known_inside(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("direct routes are root's")

    async def work() -> None:
        network = Network(direct=("localhost:9",), allow_private=True)
        async with await maker(root, None)(network=network) as sandbox:
            assert b"127.0.0.1 localhost" in await sandbox.read("/etc/hosts")

    run(work())


@pytest.mark.sandbox
def test_gvisor_says_that_it_has_no_direct_routes(root: Path) -> None:
    async def work() -> None:
        network = Network(direct=("127.0.0.1:9",), allow_private=True)
        with pytest.raises(UnsupportedError, match="no direct routes"):
            await maker(root, "gvisor")(network=network)

    run(work())
