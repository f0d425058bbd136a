"""The connection to a guest's agent over a serial line, and its new identity after a fork."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rorqual.errors import SandboxFailedError, SandboxLostError
from rorqual.sandbox import wire
from rorqual.sandbox.client import AgentClient

SEED_BYTES = 64


class LineClient(AgentClient):
    """An `AgentClient` whose line can be silent while the machine is saved."""

    @asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """No half of a message is under way inside; what is sent meanwhile waits."""
        answer = asyncio.create_task(self.ask(b"z"))
        await asyncio.sleep(0)  # the request itself is sent
        held: list[bytes] = []
        self._held = held
        try:
            await answer
            yield
        finally:
            self._held = None
            self.send(b"y", 0)
            if self._transport is not None and not self._transport.is_closing():
                for frames in held:
                    self._transport.write(frames)


async def connect_line(sock: socket.socket, *, timeout_s: float) -> LineClient:
    """Greet the agent at the other end of a serial line, started or restored.

    Commands of the host before, but for named ones, end.

    Raises:
        SandboxLostError: it does not answer.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    _, client = await loop.create_connection(LineClient, sock=sock)
    client.send(b"h", 0)
    try:
        await asyncio.wait_for(asyncio.shield(client.ready), timeout_s)
    except (TimeoutError, SandboxLostError):
        client.close()
        with contextlib.suppress(Exception):
            await client.closed
        raise SandboxLostError("the guest's agent did not answer") from None
    return client


async def renew(client: AgentClient, *, hostname: str | None) -> None:
    """Set the guest's clock and reseed its random pool; with a host name, give it a new identity.

    Raises:
        SandboxFailedError: the guest refused.
    """
    fields = wire.number_field(b"T", time.time_ns())
    fields += b"S" + SEED_BYTES.to_bytes(4, "little") + os.urandom(SEED_BYTES)
    wanted = b"TS"
    if hostname is not None:
        fields += wire.text_field(b"H", hostname)
        fields += wire.text_field(b"M", secrets.token_hex(16) + "\n")
        wanted = b"TSHM"
    done = await client.ask(b"n", fields)
    if missing := set(wanted) - set(done):
        raise SandboxFailedError(
            f"the guest did not renew {', '.join(chr(tag) for tag in sorted(missing))}"
        )
