"""Firecracker as a process: its directory, its API, and the socket to the guest's agent.

It works in a directory of its own, where every file it is told of is a link to a descriptor it
inherits: as nobody it may open nothing else, and a saved state, which remembers paths, finds each
machine's own files behind the same names.

Written and tested against the published description of the API; not run on hardware with KVM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError, SandboxFailedError, SandboxLostError, SubstrateMissingError
from rorqual.sandbox.contract import Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.console import Console
from rorqual.sandbox.microvm.firecracker_api import (
    API,
    DESCRIBE,
    PAUSE,
    RESUME,
    VSOCK,
    FirecrackerApi,
    Request,
    socket_path,
)
from rorqual.sandbox.microvm.hardware import VSOCK_PORT
from rorqual.sandbox.microvm.launch import NOBODY, MachineProcess, launch, unprivileged
from rorqual.sandbox.microvm.line import LineClient, connect_line

START_S = 10.0
"""Longest from the start of the process to its API's first answer."""

POLL_S = 0.005
_DIAL_S = 2.0
_MAX_REPLY_BYTES = 32

WHERE_TO_GET = (
    "put the `firecracker` program of a release of github.com/firecracker-microvm/firecracker "
    "on PATH; Debian has no package of it"
)


@dataclass(frozen=True)
class Firecracker:
    """An installed Firecracker."""

    program: str
    version: str


def find_firecracker() -> Firecracker:
    """The one on PATH.

    Raises:
        SubstrateMissingError: there is none, or it does not start.
    """
    program = shutil.which("firecracker")
    if program is None or os.uname().machine != "x86_64":
        raise SubstrateMissingError(
            f"firecracker is not installed (or this is no x86-64 machine): {WHERE_TO_GET}"
        )
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubstrateMissingError(f"{program} does not start: {error}") from error
    found = re.search(r"Firecracker v(\S+)", said.stdout)
    if found is None:
        told = (said.stderr or said.stdout).strip()[-300:]
        raise SubstrateMissingError(f"{program} does not start: {told or said.returncode}")
    return Firecracker(program, found[1])


class FirecrackerMachine(MachineProcess):
    """A running Firecracker. Made by `start_firecracker`; end it with `end`."""

    def __init__(self, directory: Path, life: socket.socket, console: Console, place: int) -> None:
        super().__init__(directory, life, console)
        self._place = place
        self.api = FirecrackerApi(place)

    async def tell(self, requests: Sequence[Request], *, timeout_s: float = 30.0) -> None:
        """Send one after the other.

        Raises:
            SandboxFailedError: one was refused, or the process died; the message has why.
        """
        for request in requests:
            try:
                await self.api.send(request, timeout_s=timeout_s)
            except SandboxLostError as error:
                raise SandboxFailedError(f"{error}: {self.said()}") from error

    async def pause(self) -> None:
        await self.tell([PAUSE])

    async def resume(self) -> None:
        await self.tell([RESUME])

    def close(self) -> None:
        place, self._place = self._place, -1
        if place >= 0:
            os.close(place)

    def said(self) -> str:
        """The end of what it and its guest said."""
        self.console.read()
        return self.console.text[-1500:] or "it said nothing"

    async def meet(self, timeout_s: float) -> LineClient:
        """Greet the agent, started or restored; commands of the host before, but for named ones,
        end.

        Raises:
            SandboxFailedError: it does not answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        client = await connect_line(await self.dial(), timeout_s=timeout_s)
                        await client.ask(b"p")  # connections of before the save are gone by now
                        return client
                    except SandboxLostError:
                        await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise SandboxFailedError(f"the guest's agent did not answer: {self.said()}") from None

    async def dial(self) -> socket.socket:
        """A connection to the agent, which has accepted it. Waits for as long as there is none.

        Raises:
            SandboxFailedError: the process died.
        """
        while True:
            if not self.is_running:
                raise SandboxFailedError(f"Firecracker ended: {self.said()}")
            try:
                async with asyncio.timeout(_DIAL_S):
                    return await self._dial_once()
            except (OSError, TimeoutError):
                await asyncio.sleep(POLL_S)

    async def _dial_once(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            with socket_path(self._place, VSOCK) as path:
                await loop.sock_connect(sock, path)
            await loop.sock_sendall(sock, b"CONNECT %d\n" % VSOCK_PORT)
            reply = b""
            while not reply.endswith(b"\n"):  # what follows is the agent's
                piece = await loop.sock_recv(sock, 1)
                if not piece or len(reply) > _MAX_REPLY_BYTES:
                    raise ConnectionRefusedError("nobody listens in the guest")
                reply += piece
            if not reply.startswith(b"OK "):
                raise ConnectionRefusedError(f"Firecracker said {reply!r}")
            await _readable(sock)
        except BaseException:
            sock.close()
            raise
        return sock


async def _readable(sock: socket.socket) -> None:
    """Wait for the first byte of the agent's greeting, and leave it there."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(sock, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(sock)
    if not sock.recv(1, socket.MSG_PEEK):
        raise ConnectionResetError("the agent closed the connection")


async def start_firecracker(
    firecracker: Firecracker,
    files: dict[str, Path],
    *,
    layout: Layout,
    id: str,
    limits: Limits,
    ram_bytes: int,
    start_s: float = START_S,
) -> FirecrackerMachine:
    """Start the process and wait for its API; it has no machine yet.

    Args:
        files: name in its directory -> file, which it can only read.
        limits: only `cpus` is used; memory is the guest's and Firecracker's own.

    Raises:
        SandboxFailedError: it did not start; the message has what it said.
    """
    directory = layout.sandboxes / id
    place = directory / "machine"

    def command(numbers: dict[str, int]) -> list[str]:
        for name in files:
            (place / name).symlink_to(f"/proc/self/fd/{numbers[name]}")
        # The shell enters the directory while it may, and sends the guest's serial port, which is
        # Firecracker's output, to the console.
        enter = ["/bin/sh", "-c", 'cd "$0" && exec "$@" >&2', str(place)]
        program = [firecracker.program, "--api-sock", API, "--id", id, "--level", "Warning"]
        return [*enter, *unprivileged(), *program]

    with contextlib.ExitStack() as closing:
        ours, theirs = socket.socketpair()
        closing.callback(theirs.close)
        opened = -1
        try:
            place.mkdir(parents=True, mode=0o700)
            opened = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.geteuid() == 0:
                os.chown(place, NOBODY, NOBODY)
            given = {}
            for name, path in files.items():
                given[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                closing.callback(os.close, given[name])
            life = await launch(
                command,
                {**given, "console": theirs.fileno()},
                directory=directory,
                layout=layout,
                limits=limits,
                ram_bytes=ram_bytes,
                log=theirs.fileno(),
            )
        except BaseException:
            ours.close()
            if opened >= 0:
                os.close(opened)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        machine = FirecrackerMachine(directory, life, Console(ours), opened)
    try:
        await _answering(machine, start_s)
    except BaseException:
        await machine.end()
        raise
    return machine


async def _answering(machine: FirecrackerMachine, start_s: float) -> None:
    try:
        async with asyncio.timeout(start_s):
            while True:
                try:
                    await machine.api.send(DESCRIBE, timeout_s=start_s)
                    return
                except SandboxError as error:
                    if not machine.is_running:
                        await asyncio.sleep(0)  # the last words arrive before the end
                        raise SandboxFailedError(
                            f"Firecracker did not start: {machine.said()}"
                        ) from error
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise SandboxFailedError(
            f"Firecracker's API did not answer in {start_s:g} s: {machine.said()}"
        ) from None
