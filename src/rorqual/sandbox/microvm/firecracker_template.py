"""Templates under Firecracker: boot, save and start by its API.

A new machine's memory is anonymous and written out whole when it is saved. A fork maps the file
privately, so forks of one template share what they do not change; the holes of the guest's unused
memory are dug again once it is written.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from rorqual.errors import SandboxError, SandboxFailedError, SandboxLostError
from rorqual.sandbox.contract import Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.firecracker import Firecracker, FirecrackerMachine, start_firecracker
from rorqual.sandbox.microvm.firecracker_api import (
    DEVICES,
    INITRAMFS,
    KERNEL,
    MEMORY,
    boot_requests,
    layer_name,
    load_request,
    save_request,
)
from rorqual.sandbox.microvm.hardware import Hardware
from rorqual.sandbox.microvm.line import LineClient
from rorqual.sandbox.microvm.template import (
    ANSWER_S,
    BOOT_S,
    RESTORE_S,
    Template,
    Templates,
    warm_up,
)

SAVE_S = 120.0
"""Longest write of a guest's whole memory."""


class FirecrackerStore(Templates[FirecrackerMachine]):
    """Firecracker's templates."""

    program = "Firecracker"

    def __init__(self, layout: Layout, firecracker: Firecracker) -> None:
        super().__init__(layout)
        self.version = firecracker.version
        self._firecracker = firecracker

    def runs(self, hardware: Hardware) -> bool:
        return hardware.machine == "firecracker"

    async def start(
        self, template: Template, *, id: str, limits: Limits
    ) -> tuple[FirecrackerMachine, LineClient]:
        files = {MEMORY: template.memory, DEVICES: template.devices}
        machine = await self._launch(template.hardware, files, id, limits)
        try:
            await machine.tell([load_request()], timeout_s=RESTORE_S)
            await machine.resume()
            return machine, await machine.meet(ANSWER_S)
        except BaseException:
            await machine.end()
            raise

    async def _boot(self, partial: Template) -> None:
        hardware = partial.hardware
        files = {KERNEL: Path(hardware.kernel), INITRAMFS: Path(hardware.initramfs)}
        limits = Limits(cpus=max(1, hardware.cpus))
        machine = await self._launch(hardware, files, secrets.token_hex(8), limits)
        try:
            await machine.tell(boot_requests(hardware))
            client = await machine.meet(BOOT_S)
            await warm_up(client)
            async with client.silence():
                await machine.pause()
                await _save(machine, partial)
            client.close()
        finally:
            await machine.end()

    async def _save_running(
        self, machine: FirecrackerMachine, client: LineClient, partial: Template
    ) -> None:
        # Saving closes the guest's connections, the original's too: the agent goes on with its
        # commands over the next one.
        refused: list[SandboxError] = []

        async def save() -> socket.socket:
            try:
                await machine.pause()
                try:
                    await _save(machine, partial)
                finally:
                    await machine.resume()
            except SandboxFailedError as error:
                refused.append(error)
            return await machine.dial()

        try:
            async with asyncio.timeout(SAVE_S + ANSWER_S):
                await client.move(save)
        except (TimeoutError, SandboxError) as error:
            await machine.end()
            raise SandboxLostError(
                f"sandbox {machine.directory.name} was lost in its snapshot: {error}"
            ) from error
        if refused:
            raise refused[0]

    async def _launch(
        self, hardware: Hardware, files: dict[str, Path], id: str, limits: Limits
    ) -> FirecrackerMachine:
        layers = {layer_name(n): Path(layer) for n, layer in enumerate(hardware.layers)}
        return await start_firecracker(
            self._firecracker,
            {**files, **layers},
            layout=self._layout,
            id=id,
            limits=limits,
            ram_bytes=hardware.ram_bytes,
        )


async def _save(machine: FirecrackerMachine, partial: Template) -> None:
    """Let a paused machine write itself down, and take the files away from it."""
    place = machine.directory / "machine"
    for name in (MEMORY, DEVICES):
        (place / name).unlink(missing_ok=True)  # the links to what it was started from
    await machine.tell([save_request()], timeout_s=SAVE_S)
    try:
        await asyncio.to_thread(_take, place / MEMORY, partial.memory)
        await asyncio.to_thread(_take, place / DEVICES, partial.devices)
    except OSError as error:
        raise SandboxFailedError(f"what Firecracker saved is not there: {error}") from error


def _take(source: Path, target: Path) -> None:
    # Its directory is the process's own: what lies there is looked at once it is out of its reach.
    source.rename(target)
    fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb"):
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise SandboxFailedError(f"Firecracker wrote no ordinary file {source.name}")
        if os.geteuid() == 0:
            os.fchown(fd, 0, 0)  # forks run as the same user and may only read it
            os.fchmod(fd, 0o644)
    if (fallocate := shutil.which("fallocate")) is not None:
        # On a file system that cannot, the file stays as large as it is.
        command = [fallocate, "--dig-holes", str(target)]
        subprocess.run(command, capture_output=True, check=False)
