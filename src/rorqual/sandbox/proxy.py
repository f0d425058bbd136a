"""The only way out of a sandbox: an HTTP proxy on the host's side which checks names.

The sandbox has no network interface but its loopback. The agent accepts connections on a loopback
port inside and relays their bytes over its own channel, so that there is no route to bypass. Names
are resolved here; an allowed name that resolves to a private address is refused unless the policy
says otherwise, since whoever owns the name could point it at this machine's neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from rorqual.errors import SandboxError, SandboxRefusedError
from rorqual.sandbox.client import AgentClient, Process
from rorqual.sandbox.contract import ExecRequest, Network

PROXY_PORT = 3128
_WAITING = 4
"""Accepts that stand ready inside; one more is posted for each that is taken."""

_HEAD_BYTES = 16384
_CONNECT_S = 15.0
_DEFAULT_PORTS = (80, 443)
_FOREVER_S = 1e6


def is_allowed(network: Network, host: str, port: int) -> bool:
    """Whether a rule of `network` covers `host`:`port`."""
    host = host.lower().rstrip(".")
    for rule in network.allow:
        if rule.startswith("["):
            name, _, rule_port = rule[1:].partition("]")
            rule_port = rule_port.lstrip(":")
        else:
            name, _, rule_port = rule.partition(":")
        ports = (int(rule_port),) if rule_port else _DEFAULT_PORTS
        matches = host.endswith(name[1:]) if name.startswith("*.") else host == name
        if matches and port in ports:
            return True
    return False


async def resolve(network: Network, host: str, port: int) -> str:
    """The address to connect to.

    Raises:
        SandboxRefusedError: the name is not allowed, or leads to a private address.
        OSError: the name does not resolve.
    """
    if not is_allowed(network, host, port):
        raise SandboxRefusedError(f"{host}:{port} is not on this sandbox's allow list")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [info[4][0] for info in found]
    for address in addresses:
        if network.allow_private or ipaddress.ip_address(address).is_global:
            return str(address)
    raise SandboxRefusedError(f"{host} resolves to a private address, which is not allowed")


class EgressProxy:
    """Serves the proxy port of one sandbox.

    Attributes:
        refusals: what was refused, newest last, for the operator.
    """

    def __init__(
        self, client: AgentClient, network: Network, *, inside_port: int = PROXY_PORT
    ) -> None:
        self.refusals: list[str] = []
        self._inside_port = inside_port
        self._client = client
        self._network = network
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen inside."""
        for _ in range(_WAITING):
            self._spawn(self._serve())

    async def stop(self) -> None:
        """Close every connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        try:
            request = ExecRequest(argv=(str(self._inside_port),), stdin=None, timeout_s=_FOREVER_S)
            inside = await self._client.start(request, builtin="accept")
            reader = _Reader(inside)
            await reader.read_head(b"+", 1)
        except (SandboxError, ValueError):
            return  # the sandbox ended
        self._spawn(self._serve())
        with contextlib.suppress(SandboxError, OSError):
            await self._handle(inside, reader)
        inside.kill()

    async def _handle(self, inside: Process, reader: _Reader) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                head = await reader.read_head(b"\r\n\r\n", _HEAD_BYTES)
                method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
                if method == "CONNECT":
                    name, _, port_text = target.rpartition(":")
                    host, port = name.strip("[]"), int(port_text)
                else:
                    url = urlsplit(target)
                    host, port = url.hostname or "", url.port or 80
                address = await resolve(self._network, host, port)
                outside = await asyncio.open_connection(address, port)
        except SandboxRefusedError as refused:
            self.refusals.append(str(refused))
            await _answer(inside, "403 Forbidden", str(refused))
            return
        except ValueError:
            await _answer(inside, "400 Bad Request", "not a proxy request")
            return
        except (OSError, TimeoutError) as error:
            await _answer(inside, "502 Bad Gateway", f"cannot reach it: {error}")
            return
        if method == "CONNECT":
            await inside.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            # One request per connection: a second one could name another host.
            path = url._replace(scheme="", netloc="").geturl() or "/"
            lines = head[:-4].split(b"\r\n")[1:]
            kept = [
                line for line in lines if not line.lower().startswith((b"connection:", b"proxy-"))
            ]
            first = f"{method} {path} HTTP/1.1".encode("latin-1")
            outside[1].write(b"\r\n".join([first, *kept, b"Connection: close", b"", b""]))
        await _relay(inside, reader, *outside)


class DirectRelay(EgressProxy):
    """Relays every connection to one port inside to one place outside."""

    def __init__(
        self, client: AgentClient, network: Network, *, inside_port: int, address: str, port: int
    ) -> None:
        super().__init__(client, network, inside_port=inside_port)
        self._place = (address, port)

    async def _handle(self, inside: Process, reader: _Reader) -> None:
        async with asyncio.timeout(_CONNECT_S):
            outside = await asyncio.open_connection(*self._place)
        await _relay(inside, reader, *outside)


async def _answer(inside: Process, status: str, text: str) -> None:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    await inside.write(head.encode() + body)
    inside.close_stdin()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(inside.wait(), 5.0)


class _Reader:
    """The bytes a process writes, as far as they are asked for."""

    def __init__(self, process: Process) -> None:
        self._pieces = aiter(process)
        self._held = b""

    async def read(self) -> bytes:
        """The next bytes; empty at the end."""
        if self._held:
            data, self._held = self._held, b""
            return data
        async for piece in self._pieces:
            return piece.data
        return b""

    async def read_head(self, mark: bytes, limit_bytes: int) -> bytes:
        """Bytes up to and with `mark`; raises ValueError beyond the limit or at the end."""
        head = b""
        while mark not in head:
            data = await self.read()
            if not data or len(head) > limit_bytes:
                raise ValueError("no request")
            head += data
        end = head.index(mark) + len(mark)
        self._held = head[end:]
        return head[:end]


async def _relay(
    inside: Process,
    reader: _Reader,
    outside_reader: asyncio.StreamReader,
    outside_writer: asyncio.StreamWriter,
) -> None:
    async def outward() -> None:
        while data := await reader.read():
            outside_writer.write(data)
            await outside_writer.drain()
        if outside_writer.can_write_eof():
            outside_writer.write_eof()

    async def inward() -> None:
        while data := await outside_reader.read(65536):
            await inside.write(data)
        inside.close_stdin()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(outward())
            group.create_task(inward())
    except* OSError:
        pass  # one end reset the connection: the other is closed below
    finally:
        outside_writer.close()


async def serve_port(client: AgentClient, port: int) -> asyncio.Server:
    """Listen on this machine's loopback and relay to `port` inside the sandbox."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = ExecRequest(argv=(str(port),), stdin=None, timeout_s=_FOREVER_S)
            inside = await client.start(request, builtin="connect")
            await _relay(inside, _Reader(inside), reader, writer)
            inside.kill()
        except (SandboxError, OSError):
            pass  # the sandbox ended or the peer left
        finally:
            writer.close()

    handler: Callable[..., Any] = handle
    return await asyncio.start_server(handler, "127.0.0.1", 0)
