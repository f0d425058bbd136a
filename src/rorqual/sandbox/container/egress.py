"""Direct routes: TCP to a few stated places for programs that know no proxy.

The sandbox's network namespace still has nothing but its loopback. Rules of nftables in it send
connections to an allowed address and port to a loopback port, which the agent relays to the host's
side; everything else that leaves is refused there, whatever routes someone may add. No rule, route
or address is made outside the sandbox's namespace.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import (
    SandboxFailedError,
    SandboxRefusedError,
    SandboxRequestError,
    SubstrateMissingError,
)
from rorqual.sandbox.contract import Network, split_host

FIRST_PORT = 3200
"""Loopback port of the first route inside; the others follow."""

_OWN_ADDRESS = "198.18.0.1"
"""Source of such connections, which a route through the loopback needs; of no one's range."""


@dataclass(frozen=True)
class Route:
    """One place; `host` resolved to `address` here, `inside` is its loopback port there."""

    host: str
    address: str
    port: int
    inside: int


async def find_routes(network: Network) -> list[Route]:
    """Resolve `network.direct`, IPv4 only.

    Raises:
        SandboxRequestError: a name does not resolve.
        SandboxRefusedError: it leads to a private address, and the policy forbids these.
    """
    loop = asyncio.get_running_loop()
    routes: list[Route] = []
    for rule in network.direct:
        host, port = split_host(rule)
        try:
            found = await loop.getaddrinfo(
                host, port, family=socket.AF_INET, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise SandboxRequestError(f"network.direct {rule!r}: {error}") from None
        address = str(found[0][4][0])
        if not (network.allow_private or ipaddress.ip_address(address).is_global):
            raise SandboxRefusedError(f"{rule} leads to a private address, which is not allowed")
        routes.append(Route(host, address, port, FIRST_PORT + len(routes)))
    return routes


def ruleset(routes: list[Route]) -> str:
    """The rules, for ``nft -f -``: allowed places to the relays, loopback, and nothing else."""
    redirects = [
        f"ip daddr {route.address} tcp dport {route.port} redirect to :{route.inside}"
        for route in routes
    ]
    lines = [
        "table inet rorqual",  # so that there is one to delete: applying it twice is the same
        "delete table inet rorqual",
        "table inet rorqual {",
        "chain allowed { type nat hook output priority -100; policy accept;",
        *redirects,
        "}",
        "chain egress { type filter hook output priority 0; policy drop;",
        f"ip daddr {{ 127.0.0.0/8, {_OWN_ADDRESS} }} accept",
        "ip6 daddr ::1 accept",
        "meta l4proto tcp reject with tcp reset",
        "reject",
        "}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def install_rules(pid: int, routes: list[Route]) -> None:
    """Put the rules into the network namespace of process `pid`.

    Raises:
        SubstrateMissingError: nft, ip or nsenter is not installed.
        SandboxFailedError: they could not be installed, or the process has no namespace of its own.
    """
    if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        raise SandboxFailedError(f"process {pid} is in this machine's own network namespace")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    programs = {name: shutil.which(name, path=path) for name in ("nft", "ip", "nsenter")}
    if missing := [name for name, at in programs.items() if at is None]:
        raise SubstrateMissingError(
            f"{missing[0]} is not installed: "
            "apt-get install --no-install-recommends nftables iproute2 util-linux"
        )
    enter = [str(programs["nsenter"]), f"--target={pid}", "--net", "--"]
    ip = [*enter, str(programs["ip"])]
    # The filter first: there is no moment with a route and without it.
    _run([*enter, str(programs["nft"]), "-f", "-"], ruleset(routes))
    _run([*ip, "address", "replace", f"{_OWN_ADDRESS}/32", "dev", "lo"])
    _run([*ip, "route", "replace", "default", "dev", "lo", "src", _OWN_ADDRESS])


def _run(command: list[str], given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SandboxFailedError(f"{command[4]}: {done.stderr.strip()[-300:]}")


def process_inside(groups: Iterable[str]) -> int:
    """A process of the sandbox in its network namespace; raises `SandboxFailedError`."""
    ours = os.readlink("/proc/self/ns/net")
    for group in groups:
        for directory, _, _ in os.walk(group):
            for pid in Path(directory, "cgroup.procs").read_text().split():
                try:
                    if os.readlink(f"/proc/{pid}/ns/net") != ours:
                        return int(pid)
                except OSError:
                    continue  # it ended
    raise SandboxFailedError("the sandbox has no network namespace of its own")
