"""Puts the control plane on a socket until it is told to stop. Loopback, or with API keys."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from rorqual.errors import ConfigError
from rorqual.sandbox.control.admission import Policy
from rorqual.sandbox.control.app import KeyCheck, create_app, opened
from rorqual.sandbox.control.hosts import Hosts, RayOptions
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.pool import Watermarks
from rorqual.sandbox.control.store import Store
from rorqual.sandbox.control.trajectories import Trajectories
from rorqual.sandbox.trajectory.log import TrajectoryLog

_DRAIN_S = 10


def serve(
    data: Path,
    *,
    shared: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8090,
    keys: KeyCheck | None = None,
    policy: Policy | None = None,
    marks: Watermarks | None = None,
    linger_s: float = 600.0,
    keep: bool = False,
    ray: RayOptions | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        data: this control plane's directory; everything in it is taken for its own.
        shared: root of the images; None is the system's.
        keys: None serves this machine only, everybody on it.
        linger_s: how long containers wait for a control plane that died.
        keep: leave containers for the next start instead of ending them.
        ray: place sandboxes on the hosts of this cluster; None is this machine alone.
        announce: gets the address once it is served.

    Raises:
        ConfigError: the address is taken or open to strangers, `data` is in use, or there is no
            such cluster.
    """
    if keys is None and not _is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host} without API keys: whoever reaches it could run "
            "commands here. Make a key with 'rorqual keys create NAME'"
        )
    store = Store(data / "control.db")  # first: it is the lock of the directory
    machine = Machine(data, shared=shared, linger_s=linger_s)
    policy = policy or Policy()
    if ray is None:
        plane = Plane(store, machine, policy, marks=marks)
    else:
        hosts = _connected(data, ray, shared, linger_s, policy.reserve_bytes)
        # Each host looks after its own memory.
        plane = Plane(store, hosts, policy, marks=marks, free_bytes=lambda: None)
    trajectories = Trajectories(plane, machine, TrajectoryLog(data / "trajectories.db"))
    app = create_app(plane, trajectories, keys=keys)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )

    async def work() -> None:
        async with opened(plane, trajectories, keep=keep):
            at = listener.getsockname()
            shown = f"[{at[0]}]" if ":" in at[0] else at[0]
            announce(f"http://{shown}:{at[1]}")
            server = _Server(config)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            await server.serve(sockets=[listener])

    with _listen(host, port) as listener:
        asyncio.run(work())


def _connected(
    data: Path, options: RayOptions, shared: Path | None, linger_s: float, reserve_bytes: int
) -> Hosts:
    try:
        from rorqual.sandbox.control.ray_hosts import RayHosts
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'rorqual[ray]'") from None
    hosts = RayHosts(data, options, shared=shared, linger_s=linger_s, reserve_bytes=reserve_bytes)
    hosts.connect()
    return hosts


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn raises them again at its end, before ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """End in order; at once the second time."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    addresses = [str(address[4][0]).partition("%")[0] for address in found]
    return bool(host) and all(ipaddress.ip_address(a).is_loopback for a in addresses)
